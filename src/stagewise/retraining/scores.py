"""How well predicted effects agree with measured ones: in order (correlation) and in size (slope)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.groups import same_label

Array = np.ndarray[Any, np.dtype[np.float64]]

_RESAMPLES = 2000
LEVEL = 0.95
_ROUNDING = 1e-12
_NORMAL_95 = 1.96


def predicted_effect(influence: xr.Dataset, weight: float) -> xr.Dataset:
    """First-order effect of giving a whole train group another weight during the window.

        effect[i, j] = influence[i, j] * train_size[i] * (weight - 1)

    Args:
        influence: ``value`` (step, train, query) in nats per unit weight of one sample, the mean over the
            samples of the group, negative = helpful; ``stderr`` if there is one; coordinate ``train_size``.
        weight: the new weight of every sample of the group.

    Returns:
        ``effect``, and ``effect_stderr`` if there is a ``stderr``, in nats; positive = the group was helpful
        if ``weight`` < 1. To be held against :func:`stagewise.retraining.ablation.window_ablation`.

    Raises:
        ValueError: ``value`` or ``train_size`` is missing.

    Example:
        >>> import xarray as xr, stagewise as sw
        >>> coords = {"step": [0], "train": ["cat"], "query": ["cat"], "train_size": ("train", [10])}
        >>> influence = xr.Dataset({"value": (("step", "train", "query"), [[[-0.5]]])}, coords)
        >>> sw.predicted_effect(influence, weight=0.5).effect.item()  # half of ten samples gone: the loss rises
        2.5
    """
    if "value" not in influence or "train_size" not in influence.coords:
        raise ValueError(
            "influence needs a variable 'value' and a coordinate 'train_size' (samples per train group), "
            f"got variables {sorted(map(str, influence.data_vars))} and coordinates "
            f"{sorted(map(str, influence.coords))}"
        )
    change = influence["train_size"] * (weight - 1)
    dims = influence["value"].dims
    effects = {"effect": (influence["value"] * change).transpose(*dims)}
    if "stderr" in influence:
        effects["effect_stderr"] = (influence["stderr"] * abs(change)).transpose(*dims)
    meaning = "positive = helpful" if weight < 1 else "negative = helpful"
    attrs = dict(influence.attrs) | {"sign": meaning, "units": "nats", "weight": weight}
    return xr.Dataset({name: effect.assign_attrs(units="nats") for name, effect in effects.items()}, attrs=attrs)


def measured_influence(effects: xr.Dataset) -> xr.Dataset:
    """Influence as measured by retraining: the inverse of :func:`predicted_effect`.

        value[i, j] = effect[i, j] / (train_size[i] * (weight - 1))

    The slope of the chord from weight 1 to the changed weight, which is the derivative only for small changes.

    Args:
        effects: ``effect`` (step, train, query) in nats, changed minus unchanged loss; ``effect_stderr`` if
            there is one; coordinate ``train_size`` and attribute ``weight``. From
            :func:`stagewise.retraining.ablation.window_ablation` or
            :func:`stagewise.retraining.leave_out.leave_out`.

    Returns:
        ``value`` and ``stderr`` (zero if none was measured) (step, train, query), in nats per unit weight of
        one sample; negative = helpful. To be given to ``dynamics.curves`` and ``dynamics.events``.

    Raises:
        ValueError: ``effect``, ``train_size`` or ``weight`` is missing, or the weight was not changed.

    Example:
        >>> import xarray as xr, stagewise as sw
        >>> coords = {"step": [0], "train": ["cat"], "query": ["cat"], "train_size": ("train", [10])}
        >>> effects = xr.Dataset({"effect": (("step", "train", "query"), [[[2.5]]])}, coords, {"weight": 0.5})
        >>> sw.measured_influence(effects).value.item()
        -0.5
    """
    lacking = [
        name
        for name, there in (("effect", effects.data_vars), ("train_size", effects.coords), ("weight", effects.attrs))
        if name not in there
    ]
    if lacking:
        raise ValueError(
            f"effects lack {lacking}; expected a variable 'effect', a coordinate 'train_size' and an attribute "
            "'weight', as window_ablation and leave_out return them"
        )
    if effects.attrs["weight"] == 1:
        raise ValueError("effects were measured with weight 1, that is without any change; use another weight")
    change = effects["train_size"] * (effects.attrs["weight"] - 1)
    value = (effects["effect"] / change).transpose(*effects["effect"].dims)
    error = effects["effect_stderr"] if "effect_stderr" in effects else xr.zeros_like(value)
    stderr = (error / abs(change)).transpose(*value.dims)
    units = {"units": "nats per unit weight"}
    sign = "negative = helpful: more weight on the training data lowers the query loss"
    attrs = dict(effects.attrs) | units | {"sign": sign}
    variables = {"value": value.assign_attrs(units), "stderr": stderr.assign_attrs(units)}
    return xr.Dataset(variables, attrs=attrs)


def agreement(predicted: xr.DataArray, measured: xr.DataArray, seed: int = 0) -> xr.Dataset:
    """Correlation and slope of measured on predicted effects over all (train, query) pairs, at every step.

    The slope is the least-squares line through the origin, sum(p m) / sum(p p): 1 = the predicted size in
    nats is right. A group's effect on itself is large and easily predicted, so both are also given without
    the pairs that carry the same label, in any query set (see :func:`stagewise.groups.same_label`).

    The 95 % intervals are percentiles of a bootstrap that resamples train groups and query groups, not pairs:
    pairs share groups, and treating them as independent would make the intervals too narrow. They say how
    much rests on the groups that happen to be there.

    Args:
        predicted: (step, train, query) in nats; may have further steps.
        measured: (step, train, query) in nats, with the same train and query labels in any order.
        seed: of the bootstrap.

    Returns:
        ``correlation`` and ``slope`` (step), each with ``_lower`` and ``_upper``; the same with the suffix
        ``_off_diagonal`` if a train and a query group carry the same label. NaN where effects do not vary at all.

    Raises:
        ValueError: labels or steps of one are missing in the other, naming them, or an effect is not finite.

    Example:
        >>> import numpy as np, xarray as xr, stagewise as sw
        >>> coords = {"step": [0], "train": list("abc"), "query": list("xy")}
        >>> predicted = xr.DataArray(np.arange(6.0).reshape(1, 3, 2), coords, ("step", "train", "query"))
        >>> sw.agreement(predicted, 2 * predicted).slope.values.round(6).tolist()  # twice what was predicted
        [2.0]
    """
    p, m = _aligned(predicted, measured)
    other = ~same_label(measured["train"].values, measured["query"].values, measured.coords.get("train_size"))
    choices = {"": np.ones_like(other)} | ({} if other.all() else {"_off_diagonal": other})
    rows, columns = _resampled(other.shape, np.random.default_rng(seed))
    attrs = {"interval": f"{LEVEL:.0%} bootstrap over train and query groups", "resamples": _RESAMPLES}
    scores: dict[str, tuple[str, Array, dict[str, Any]]] = {}
    for suffix, pairs in choices.items():
        value = _scores(p, m, np.ones((1, len(rows[0]))), np.ones((1, len(columns[0]))), pairs)
        draws = _scores(p, m, rows, columns, pairs)
        for name in value:
            lower, upper = interval_ends(draws[name])
            for end, numbers in (("", value[name][0]), ("_lower", lower), ("_upper", upper)):
                scores[f"{name}{suffix}{end}"] = ("step", numbers, attrs | {"pairs": int(pairs.sum())})
    return xr.Dataset(scores, {"step": measured["step"].values})


def coverage(predicted: xr.Dataset, measured: xr.Dataset, reach: float = _NORMAL_95) -> xr.DataArray:
    """How often the stated 95 % intervals hold the measured effects, at every step.

    Intervals of predictions hold the noise of the chains, and what was measured has its own standard error. What
    neither knows of, such as a window too long for one checkpoint to predict, shows as a share far below 0.95.

    Args:
        predicted: ``effect`` and perhaps ``effect_stderr`` (step, train, query), from :func:`predicted_effect`.
        measured: the same, with the same labels in any order.
        reach: of an interval, in standard errors; of few replicates it is the quantile of Student's t.

    Returns:
        (step) share of all pairs whose difference is within ``reach`` standard errors of both together.

    Raises:
        ValueError: as for :func:`agreement`.

    Example:
        >>> import numpy as np, xarray as xr
        >>> from stagewise.retraining.scores import coverage
        >>> dims, coords = ("step", "train", "query"), {"step": [0], "train": list("ab"), "query": ["x"]}
        >>> both = {"effect": (dims, [[[1.0], [2.0]]]), "effect_stderr": (dims, [[[0.1], [0.1]]])}
        >>> measured = xr.Dataset({"effect": (dims, [[[1.1], [2.5]]])}, coords)
        >>> coverage(xr.Dataset(both, coords), measured).values.tolist()
        [0.5]
    """
    p, m = _aligned(predicted["effect"], measured["effect"])
    errors = [
        _aligned(side["effect_stderr"], measured["effect"])[0] if "effect_stderr" in side else np.zeros_like(m)
        for side in (predicted, measured)
    ]
    held = np.abs(p - m) <= reach * np.hypot(*errors)
    return xr.DataArray(held.mean((1, 2)), {"step": measured["step"].values}, ("step",), "coverage")


def _aligned(predicted: xr.DataArray, measured: xr.DataArray) -> tuple[Array, Array]:
    """Both as ``(step, train, query)`` float64 arrays in the order of ``measured``."""
    for dim in ("step", "train", "query"):
        here, there = (set(array[dim].values.tolist()) for array in (predicted, measured))
        lacking = {"predicted": there - here, "measured": set() if dim == "step" else here - there}
        for name, labels in lacking.items():
            if labels:
                raise ValueError(f"{name} effects lack {dim} {sorted(labels)}; both must cover the same groups")
    arrays = []
    for array in (predicted.sel({dim: measured[dim] for dim in ("step", "train", "query")}), measured):
        arrays.append(np.asarray(array.transpose("step", "train", "query").values, dtype=np.float64))
        if not np.isfinite(arrays[-1]).all():
            bad = measured["step"].values[~np.isfinite(arrays[-1]).all((1, 2))].tolist()
            raise ValueError(f"effects at steps {bad} are not all finite; leave these steps out")
    return arrays[0], arrays[1]


def _resampled(shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Array, Array]:
    """How often every train group and every query group is drawn: ``(resamples, groups)`` each."""
    rows, columns = (generator.multinomial(k, np.full(k, 1 / k), _RESAMPLES).astype(float) for k in shape)
    return rows, columns


def _scores(p: Array, m: Array, rows: Array, columns: Array, pairs: NDArray[np.bool_]) -> dict[str, Array]:
    """Correlation and slope of the chosen pairs, weighted by rows x columns: ``(resamples, step)``."""

    def total(values: Array) -> Array:
        sums: Array = np.einsum("br,srq,bq->bs", rows, values * pairs, columns, optimize=True)
        return sums

    # Correlation ignores a common shift; removing it first keeps the sums free of cancellation.
    p0, m0 = (values - values.mean((1, 2), keepdims=True) for values in (p, m))
    with np.errstate(invalid="ignore", divide="ignore"):
        size, sum_p, sum_m = total(np.ones_like(p)), total(p0), total(m0)
        power_p, power_m = total(p0 * p0), total(m0 * m0)
        spread = (power_p - sum_p**2 / size) * (power_m - sum_m**2 / size)
        # A resample may hold one pair only: what is left of its spread is rounding.
        spread = np.where(spread > _ROUNDING * power_p * power_m, spread, np.nan)
        correlation = (total(p0 * m0) - sum_p * sum_m / size) / np.sqrt(spread)
        return {"correlation": correlation, "slope": total(p * m) / total(p * p)}


def interval_ends(draws: Array) -> tuple[Array, Array]:
    """Ends of the interval over the resamples in which the score is defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # defined in none: NaN is the answer
        lower, upper = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return lower, upper
