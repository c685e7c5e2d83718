"""Influence within phases and between them: the law of total covariance.

If the draws of the local posterior fall into phases u with weights pi_u and mean losses mu_u,

    - kappa Cov(l_i, l_j)  =  - kappa sum_u pi_u Cov_u(l_i, l_j)  -  kappa sum_(u<v) pi_u pi_v Delta_i^uv Delta_j^uv

with Delta^uv = mu_u - mu_v. The first part is influence inside the phases. The second is there only while the
posterior is divided: it spikes during a transition, for pairs on which the phases disagree most, and its sign is
that of -Delta_i Delta_j.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from stagewise.groups import Groups, Labels
from stagewise.influence.covariance import group_sums, mean_and_stderr
from stagewise.influence.pairs import Estimator, influence_matrix
from stagewise.influence.trusted import (
    Traces,
    as_traces,
    carried_labels,
    data_sets,
    joined,
    ok_chains,
    over_checkpoints,
)
from stagewise.traces.columns import Columns

Member = NDArray[np.bool_]
"""Whether a draw lies in a phase, ``(chain, draw)``."""


def phase_decomposition(
    traces: Traces | str | Path,
    phases: Mapping[int, ArrayLike],
    *,
    train_groups: Labels | None = None,
    query_groups: Mapping[str, Labels | None] | None = None,
    grouped: bool = True,
    tokens: bool = False,
    self_pairs: bool = True,
    trusted_only: bool = True,
) -> xr.Dataset:
    """Split the influence of a local posterior into what happens within its phases and between them.

    Covariances here are divided by the number of draws N, so that the parts add up; ``total`` is therefore (N - 1)/N
    times the pooled value of :func:`stagewise.bif`, for samples and groups alike.

    Chains that each stay in one phase have not converged, and ``trusted_only`` leaves such checkpoints out. Without it
    the weights are the share of chains that were started in a phase, or fell into it, not of the posterior.

    Standard errors are to first order, from what each chain adds (the infinitesimal jackknife), so they need no model
    of how often chains cross. They are too small where a handful of chains visits a phase. Where it is a single one,
    the doubt of the phase's mean, and of all that is between phases, is unknown and NaN.

    Args:
        traces: loss traces, or the run folder that holds them.
        phases: by step, the label of the phase of every draw ``(chain, draw)``, or of every chain ``(chain,)``;
            failed chains have labels too, which are ignored. Steps without labels are left out.
        train_groups: as in :func:`stagewise.bif`.
        query_groups: the same.
        grouped: the same.
        tokens: the same.
        self_pairs: the same.
        trusted_only: the same.

    Returns:
        Dataset, every number with its ``_stderr``:

        * ``weight`` ``(step, phase)``: share of the draws;
        * ``mean_train`` ``(step, phase, train)`` and ``mean_query`` ``(step, phase, query)``: mean loss in a phase,
          nats; NaN if no draw is in it;
        * ``within`` ``(step, phase, train, query)``: -kappa pi_u Cov_u;
        * ``between`` ``(step, train, query)``: the last term of the formula;
        * ``total`` ``(step, train, query)``: ``within`` of all phases and ``between``.

        The last three in nats per unit weight, negative is helpful. As in :func:`stagewise.bif` a sample's pair with
        itself is left out of the means of groups only on request, here from each part.

    Raises:
        NoTrustedCheckpointError: no labelled checkpoint can be trusted, with the reasons.
        ValueError: labels do not fit the traces, fewer than two chains, or too many pairs.

    Example:
        >>> import numpy as np, torch, stagewise as sw
        >>> from stagewise.sampling.chains import sample_block
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> tree = sample_block(task, start, sw.LocalPosterior(window=10), sw.Chains(chains=8, draws=64))
        >>> traces = sw.TracesInMemory({0: tree})
        >>> loss = tree["train/loss"].mean("sample")
        >>> phases = {0: np.where(loss < loss.median(), "low", "high")}
        >>> parts = sw.phase_decomposition(traces, phases, train_groups=list("aabb"))
        >>> parts.within.dims, parts.weight.values
        (('step', 'phase', 'train', 'query'), array([[0.5, 0.5]]))
    """
    traces = as_traces(traces)
    if not phases or (unknown := sorted(set(phases) - set(traces.steps))):
        got = f"labels of steps {unknown}" if phases else "no labels"
        raise ValueError(f"phases: got {got}, expected labels of some of the sampled steps {list(traces.steps)}")
    labels = {step: np.asarray(phases[step]).astype(str) for step in sorted(phases)}
    names = Groups.of_labels(np.concatenate([array.ravel() for array in labels.values()]), "phases").labels
    groups = carried_labels(traces, train_groups, query_groups or {}, grouped)

    def estimate(step: int, tree: xr.DataTree) -> xr.Dataset:
        members = _members(labels[step], names, tree, step)
        train, queries, weight = data_sets(tree, groups, grouped, "full", tokens, self_pairs)
        parts = [_decomposed(train, query, members, weight, shared) for query, shared in queries]
        return joined(parts, "query").assign_coords(phase=list(names))

    result = over_checkpoints(traces, list(labels), trusted_only, estimate)
    result.attrs |= {
        "estimator": "phase decomposition",
        "tokens": tokens,
        "units": "nats per unit weight",
        "sign": "negative = helpful: more weight on the training data lowers the query loss",
    }
    for name, variable in result.data_vars.items():
        special = {"weight": "1", "mean": "nats"}
        variable.attrs["units"] = special.get(str(name).split("_")[0], "nats per unit weight")
    return result


def _members(labels: NDArray[np.str_], names: tuple[str, ...], tree: xr.DataTree, step: int) -> list[Member]:
    """For every phase, which draws of the good chains are in it."""
    chains, draws = tree["chains"].sizes["chain"], tree["train"].sizes["draw"]
    if labels.shape not in ((chains,), (chains, draws)):
        expected = f"{(chains,)} or {(chains, draws)}"
        raise ValueError(f"phases[{step}]: expected labels of shape {expected}, got {labels.shape}")
    kept = ok_chains(tree)
    if len(kept) < 2:
        raise ValueError(f"step {step}: {len(kept)} chain ended ok, expected two or more; run more chains")
    of_draws = np.broadcast_to(labels.reshape(chains, -1), (chains, draws))[kept]
    return [of_draws == name for name in names]


def _decomposed(train: Columns, query: Columns, members: list[Member], weight: float, shared: bool) -> xr.Dataset:
    """All parts for one query set.

    Each part is the covariance of a part of the traces: a loss is its phase's mean plus residuals that differ from
    zero in one phase only, and these are uncorrelated. What is between phases is what the residuals leave over, in
    every chain, and so its standard error knows about the doubt of the phases' means.
    """
    estimator = Estimator("covariance", "pooled", -weight * (1 - 1 / members[0].size), pieces=1)
    total = influence_matrix(train, query, estimator, shared)
    if "replicates" not in total:
        pairs = " x ".join(str(size) for size in total["value"].shape)
        raise ValueError(f"{pairs} pairs are too many to decompose; pass train_groups or query_groups")
    inside = [influence_matrix(_residual(train, m), _residual(query, m), estimator, shared) for m in members]
    within = xr.concat(inside, "phase", coords="minimal", compat="override", join="exact")
    between = total["replicates"] - within["replicates"].sum("phase")
    doubt = between.std("replicate", ddof=1) / np.sqrt(len(members[0]))
    known = not any(m.any(1).sum() == 1 for m in members)
    share, share_stderr = mean_and_stderr(np.stack([m.mean(1) for m in members], 1))
    parts: dict[str, Any] = {
        "weight": ("phase", share),
        "weight_stderr": ("phase", share_stderr),
        "within": within["value"],
        "within_stderr": within["stderr"],
        "between": between.mean("replicate"),
        "between_stderr": doubt.where(known),
        "total": total["value"],
        "total_stderr": total["stderr"],
    }
    for name, side in (("train", train), ("query", query)):
        means, stderrs = zip(*(_mean(side, m) for m in members), strict=True)
        parts[f"mean_{name}"] = (("phase", name), np.stack(means))
        parts[f"mean_{name}_stderr"] = (("phase", name), np.stack(stderrs))
    return xr.Dataset(parts)


def _residual(side: Columns, inside: Member) -> Columns:
    """The traces about their mean in a phase, and zero outside of it."""
    mean = side.traces[inside].mean(0) if inside.any() else 0.0
    return replace(side, traces=np.where(inside[..., None], side.traces - mean, 0.0))


def _mean(side: Columns, inside: Member) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of every row in a phase, and its standard error from the chains' residuals (that of a ratio)."""
    rows = group_sums(side.traces, side.rows) / side.sizes
    visitors = inside.any(1).sum()
    unknown = np.full(rows.shape[-1], np.nan)
    if visitors == 0:
        return unknown, unknown
    mean = rows[inside].mean(0)
    responses = np.where(inside[..., None], rows - mean, 0.0).mean(1) / inside.mean()
    return mean, mean_and_stderr(responses)[1] if visitors > 1 else unknown
