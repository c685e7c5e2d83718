"""The linear datamodelling score: does an attribution order retrained subsets as their losses do?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from stagewise.groups import Labels, same_label
from stagewise.retraining.scores import LEVEL, Array, interval_ends, predicted_effect

_TIE = 1e-12
_FEWEST = 4
_SHOWN = 10  # labels in an error


def lds(
    attribution: xr.Dataset, losses: xr.DataArray, kept: xr.DataArray, *, resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Linear datamodelling score (Park et al. 2023, arXiv 2303.14186) at every step of training.

    For each query the Spearman correlation, over replays that were retrained on subsets of the data, between the
    loss and its prediction from the attribution,

        predicted[m, j] = - sum_{i left out of replay m} value[i, j] * train_size[i],

    and its mean over queries. Where a query carries the label of a train group (in any query set, see
    :func:`stagewise.groups.same_label`), only the replays that keep this group count: what was never learnt is no test
    of an attribution. A query for which losses or predictions do not vary (up to rounding, 1e-12 of the largest)
    has no correlation and is left out of the mean.

    The 95 % intervals are percentiles of a bootstrap over replays and over queries. Of fewer than four replays they
    would have hardly any width, and such are refused.

    Args:
        attribution: ``value`` (step, train, query) in nats per unit weight of one sample, negative = helpful;
            coordinate ``train_size``. It may have further steps, train groups must be those of ``kept``.
        losses: of the replays, in nats (step, replay, query), as
            :func:`stagewise.retraining.leave_out.retrain` returns them.
        kept: which train groups each replay has kept, bool (replay, train). Replays are paired by their coordinate
            ``replay`` if both have one, else by their order.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        ``lds`` (step) in [-1, 1] with ``lds_lower`` and ``lds_upper``; ``spearman`` (step, query), NaN where
        there is none; ``queries`` (step), the number that have one. NaN if none has.

    Raises:
        ValueError: the labels or replays do not match, there are fewer than four replays, or something is not finite.

    Example:
        >>> import numpy as np, xarray as xr, stagewise as sw
        >>> coords = {"step": [0], "train": list("abcd"), "query": ["x"], "train_size": ("train", [1] * 4)}
        >>> influence = xr.Dataset({"value": (("step", "train", "query"), -np.arange(4.0).reshape(1, 4, 1))}, coords)
        >>> kept = xr.DataArray(~np.eye(4, dtype=bool), {"train": list("abcd")}, ("replay", "train"))
        >>> losses = xr.DataArray(  # each replay lacks one group, and loses what the group had helped
        ...     np.arange(4.0).reshape(1, 4, 1), {"step": [0], "query": ["x"]}, ("step", "replay", "query")
        ... )
        >>> sw.lds(influence, losses, kept).lds.item()
        1.0
    """
    effect = predicted_effect(attribution, 0.0)["effect"]
    _check_dims(losses, kept)
    kept = _of_replays(losses, kept)
    _check_labels(
        effect,
        losses,
        kept,
        hint="losses and kept must be of the same groups",
        unsaid="kept does not say which replays have kept",
    )
    losses = losses.transpose("step", "replay", "query")
    kept = kept.transpose("replay", "train").astype(bool)
    effect = effect.sel({dim: whole[dim] for dim, whole in (("step", losses), ("train", kept), ("query", losses))})
    predicted = np.einsum("rt,stq->srq", ~kept.values, effect.transpose("step", "train", "query").values)
    measured = losses.values.astype(float)
    usable = _usable(losses["query"].values, kept, effect.coords.get("train_size"))
    return _scored(predicted, measured, usable, losses, resamples, seed)


def window_lds(influence: xr.Dataset, measured: xr.Dataset, *, resamples: int = 1000, seed: int = 0) -> xr.Dataset:
    """Linear datamodelling score of single samples in windows of training, at every checkpoint.

    For each query the Spearman correlation, over the halves that windows were retrained with, between the effect and
    its prediction to first order,

        predicted[h, j] = sum_i (weight[h, i] - 1) value[i, j],

    and its mean over queries, as in :func:`lds`. Only order and sign of the values count, so that estimates without a
    unit can be scored too: larger must mean that more weight raises the loss.

    Args:
        influence: ``value`` (step, train, query) of single samples, negative = helpful, e.g. that of
            ``window_influence(..., per="sample")``: train labels are their indices. It may have further steps.
        measured: ``effect`` and ``weight``, from :func:`stagewise.retraining.halves.window_halves`.
        resamples: of the bootstrap over halves and over queries.
        seed: of the bootstrap.

    Returns:
        ``lds`` (step) in [-1, 1] with ``lds_lower`` and ``lds_upper``, its 95 % interval; ``spearman`` (step, query);
        ``queries`` (step), the number that have one.

    Raises:
        ValueError: the labels do not match, there are fewer than four halves, or something is not finite.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)},
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> run = sw.Trajectory.from_checkpoints([start])
        >>> measured = sw.window_halves(task, run, window=3, halves=6, weights=(0.9, 1.1))
        >>> exact = sw.window_influence(task, run, window=3, per="sample")
        >>> round(sw.window_lds(exact, measured).lds.item(), 1)
        1.0
    """
    effect = measured["effect"].transpose("step", "half", "query")
    weight = measured["weight"].transpose("half", "train")
    value = influence["value"].transpose("step", "train", "query")
    _check_labels(
        value,
        effect,
        weight,
        hint="it must be of the samples and queries of what was measured, e.g. window_influence(..., per='sample')",
        unsaid="the halves give no weight to",
    )
    _check_count(effect.sizes["half"], "halves")
    value = value.sel({dim: whole[dim] for dim, whole in (("step", effect), ("train", weight), ("query", effect))})
    predicted = np.einsum("ht,stq->shq", weight.values - 1, value.values)
    usable = np.ones((effect.sizes["query"], effect.sizes["half"]))
    return _scored(predicted, effect.values, usable, effect, resamples, seed)


def _scored(
    predicted: Array, measured: Array, usable: Array, labels: xr.DataArray, resamples: int, seed: int
) -> xr.Dataset:
    """Correlation of effects ``(step, replay, query)`` over the replays that count, with bootstrap intervals."""
    _check_finite(labels["step"].values, predicted, measured)
    generator = np.random.default_rng(seed)
    _, replays, queries = measured.shape
    counts, weights = (generator.multinomial(k, np.full(k, 1 / k), resamples) for k in (replays, queries))
    single = _correlations(predicted, measured, np.ones((1, replays)), usable)
    draws = _mean(_correlations(predicted, measured, counts.astype(float), usable), weights.astype(float))
    lower, upper = interval_ends(draws.T)
    attrs = {"interval": f"{LEVEL:.0%} bootstrap over replays and queries", "resamples": resamples}
    scores = {"lds": _mean(single, np.ones((1, queries)))[:, 0], "lds_lower": lower, "lds_upper": upper}
    variables = {name: ("step", score, attrs) for name, score in scores.items()}
    dataset = xr.Dataset(variables, {"step": labels["step"].values, "query": labels["query"].values})
    rank = {"spearman": (("step", "query"), single[:, 0]), "queries": ("step", np.isfinite(single[:, 0]).sum(1))}
    return dataset.assign(rank)


def _usable(queries: Labels, kept: xr.DataArray, sizes: xr.DataArray | None) -> Array:
    """Which replays count for which query ``(query, replay)``, as 0 and 1: those that kept all groups of its label."""
    lacking = ~kept.values @ same_label(kept["train"].values, queries, sizes)
    return (~lacking.T).astype(float)


def _correlations(predicted: Array, measured: Array, counts: Array, usable: Array) -> Array:
    """Spearman correlation in every resample ``(step, resample, query)``, from ``(step, replay, query)``."""
    steps, _, queries = measured.shape
    result = np.empty((steps, len(counts), queries))
    for query in range(queries):
        drawn = counts * usable[query]
        for step in range(steps):
            x, y = (_ranks(values[step, :, query], drawn) for values in (predicted, measured))
            products = [(drawn * a * b).sum(1) for a, b in ((x, y), (x, x), (y, y))]
            with np.errstate(invalid="ignore", divide="ignore"):
                result[step, :, query] = products[0] / np.sqrt(products[1] * products[2])
    return result


def _ranks(values: Array, counts: Array) -> Array:
    """Centred rank of each replay ``(resample, replay)`` where replay k was drawn ``counts[., k]`` times.

    The rank is the number of draws below, ties counting half, so that all resamples take one product with the
    matrix of comparisons.
    """
    difference = values[None, :] - values[:, None]
    difference[abs(difference) <= _TIE * abs(values).max()] = 0
    below = (np.sign(difference) + 1) / 2
    ranks: Array = counts @ below - counts.sum(1, keepdims=True) / 2
    return ranks


def _mean(correlations: Array, weights: Array) -> Array:
    """Mean over the queries that have a correlation ``(step, resample)``; weights ``(resample, query)``."""
    there = np.isfinite(correlations) * weights
    with np.errstate(invalid="ignore"):
        mean: Array = (np.nan_to_num(correlations) * there).sum(-1) / there.sum(-1)
    return mean


def _of_replays(losses: xr.DataArray, kept: xr.DataArray) -> xr.DataArray:
    """What the replays of ``losses`` have kept, in their order."""
    if "replay" in losses.coords and "replay" in kept.coords:
        if missing := sorted(set(losses["replay"].values.tolist()) - set(kept["replay"].values.tolist())):
            raise ValueError(f"kept lacks replay {missing[:_SHOWN]} of the losses; both must call the replays alike")
        kept = kept.sel(replay=losses["replay"].values)
    if losses.sizes["replay"] != kept.sizes["replay"]:
        raise ValueError(f"losses have {losses.sizes['replay']} replays, but kept has {kept.sizes['replay']}")
    _check_count(losses.sizes["replay"], "replays")
    return kept


def _check_count(count: int, what: str) -> None:
    if count < _FEWEST:
        raise ValueError(f"got {count} {what}, expected {_FEWEST} or more, preferably tens: retrain more subsets")


def _check_dims(losses: xr.DataArray, kept: xr.DataArray) -> None:
    for name, array, dims in (("losses", losses, ("step", "replay", "query")), ("kept", kept, ("replay", "train"))):
        if set(array.dims) != set(dims):
            raise ValueError(f"{name} must have dims {dims}, got {array.dims}")


def _check_labels(
    attribution: xr.DataArray, measured: xr.DataArray, changed: xr.DataArray, hint: str, unsaid: str
) -> None:
    """Whether the attribution has all that was measured, and what was changed is all of its train labels."""
    for dim, there in (("step", measured), ("query", measured), ("train", changed)):
        if lacking := sorted(set(there[dim].values.tolist()) - set(attribution[dim].values.tolist())):
            raise ValueError(f"the attribution lacks {dim} {lacking[:_SHOWN]}; {hint}")
    if unknown := sorted(set(attribution["train"].values.tolist()) - set(changed["train"].values.tolist())):
        raise ValueError(f"{unsaid} train {unknown[:_SHOWN]}")


def _check_finite(steps: Array, *arrays: Array) -> None:
    bad = ~np.all([np.isfinite(array).all((1, 2)) for array in arrays], axis=0)
    if bad.any():
        raise ValueError(f"attribution or losses at steps {steps[bad].tolist()} are not finite; leave these steps out")
