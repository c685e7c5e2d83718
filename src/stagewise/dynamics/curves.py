"""Influence as a function of training time, with a pointwise confidence band."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy import special

DIMS = ("step", "train", "query")


def curves(influence: xr.Dataset, level: float = 0.95) -> xr.Dataset:
    """The influence with a pointwise confidence band: value +- c stderr.

    c is the two-sided quantile of Student's t with R-1 degrees of freedom for R replicates (or R batch orders,
    attribute ``repeats``), of the normal distribution without any. The band holds at each step taken alone.
    Whether a curve as a whole changed its sign is another question, answered by
    :func:`stagewise.dynamics.events`.

    Args:
        influence: ``value`` and ``stderr`` (step, train, query) in nats per unit weight, negative is helpful.
            Sampled estimators add ``replicates`` (step, replicate, train, query).
        level: coverage of the band at one step.

    Returns:
        The same dataset, with ``lower`` and ``upper`` (step, train, query).

    Raises:
        ValueError: the influence is malformed or not finite, or the level is not between 0 and 1.

    Example:
        >>> import numpy as np, stagewise as sw, xarray as xr
        >>> value = np.array([0.0, -2.0, 1.0, 3.0]).reshape(4, 1, 1)
        >>> dims = ("step", "train", "query")
        >>> influence = xr.Dataset(
        ...     {"value": (dims, value), "stderr": (dims, np.full_like(value, 0.1))},
        ...     {"step": [0, 10, 100, 1000], "train": ["cats"], "query": ["dogs"]},
        ... )
        >>> band = sw.curves(influence, level=0.9)
        >>> band.upper.sel(train="cats", query="dogs").values.round(2)
        array([ 0.16, -1.84,  1.16,  3.16])
    """
    influence = checked(influence, level)
    reach = critical(1 - level, degrees(influence)) * influence["stderr"]
    band = {"lower": influence["value"] - reach, "upper": influence["value"] + reach}
    about = influence["value"].attrs | {"level": level}
    return influence.assign({name: edge.assign_attrs(about) for name, edge in band.items()})


def pair(curves: xr.Dataset, train: Any, query: Any) -> xr.Dataset:
    """The curve of one (train, query) pair, chosen by label: every variable along ``step``.

    Raises:
        ValueError: there is no such label.
    """
    for dim, label in (("train", train), ("query", query)):
        there = curves[dim].values.tolist()
        if label not in there:
            raise ValueError(f"no {dim} {label!r} among {there[:10]}{' ...' if len(there) > 10 else ''}")
        curves = curves.isel({dim: there.index(label)})
    return curves


def degrees(influence: xr.Dataset) -> float:
    """Degrees of freedom behind ``stderr``: replicates, or batch orders, - 1; infinite if there are none."""
    orders = influence.attrs.get("repeats", 1)
    if "replicates" in influence or orders > 1:
        return float(influence.sizes.get("replicate", orders) - 1)
    return float("inf")


def critical(error: float, degrees: float) -> float:
    """The c for which noise makes |value| > c stderr with probability ``error``, both signs together."""
    return float(-special.stdtrit(degrees, error / 2))


def checked(influence: xr.Dataset, level: float) -> xr.Dataset:
    """The influence with ``step`` first and (train, query) last; refused if it allows no conclusion."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    expected = {"value": DIMS, "stderr": DIMS, "replicates": ("step", "replicate", "train", "query")}
    for name in ("value", "stderr"):
        if name not in influence:
            raise ValueError(f"influence must hold {name!r} with dims {DIMS}, got {[*influence.data_vars]}")
    for name in expected.keys() & influence.data_vars.keys():
        if set(influence[name].dims) != set(expected[name]):
            raise ValueError(f"{name!r} must have dims {expected[name]}, got {influence[name].dims}")
    if "replicates" in influence and influence.sizes["replicate"] < 2:
        raise ValueError("one replicate has no spread: make two or more, of the chains or of blocks of draws")
    influence = influence.transpose("step", ..., "train", "query")
    steps = influence["step"].values
    if len(steps) == 0 or steps[0] < 0 or (np.diff(steps) <= 0).any():
        raise ValueError(f"steps must ascend from 0 or later without repeats, got {steps.tolist()}")
    for name in expected.keys() & influence.data_vars.keys():
        finite = np.isfinite(influence[name].values).reshape(len(steps), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"{name!r} is not finite at steps {steps[~finite].tolist()}: leave those steps out")
    if (influence["stderr"].values < 0).any():
        raise ValueError("'stderr' must not be negative")
    return influence
