"""How a hierarchy of items unfolds in a model's representations: one branch curve for every level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.spatial.distance import cdist


def squared_distances(representations: xr.DataArray) -> xr.DataArray:
    """Squared Euclidean distances between the representations of all items at every step.

    Args:
        representations: ``(step, item, unit)``.

    Returns:
        ``(step, item, other)``, in squared units of the representations.

    Raises:
        ValueError: the dimensions are others.

    Example:
        >>> import stagewise as sw, xarray as xr
        >>> points = xr.DataArray([[[0.0, 0.0], [3.0, 4.0]]], dims=("step", "item", "unit"))
        >>> sw.squared_distances(points).values
        array([[[ 0., 25.],
                [25.,  0.]]])
    """
    _check_dims(representations, "representations", ("step", "item", "unit"))
    ordered = representations.transpose("step", "item", "unit")
    distances = np.stack([cdist(items, items, "sqeuclidean") for items in ordered.values])
    coords = {"step": ordered["step"].values, "item": ordered["item"].values, "other": ordered["item"].values}
    return xr.DataArray(distances, coords, ("step", "item", "other"))


def separations(distances: xr.DataArray, labels: Sequence[Sequence[Any]]) -> xr.DataArray:
    """Branch curves of a hierarchy: how far each level has separated what it is the first to tell apart.

    At level L it is the mean squared distance of the pairs that L separates and no coarser level does, minus that of
    the pairs that L leaves together (0 if there are none). It is zero before the branch and rises as it opens; see
    :func:`stagewise.rise` for its onset.

    Args:
        distances: squared distances ``(step, item, other)``; ``other`` may be in any order if both have coordinates.
        labels: groupings from coarse to fine, each with the label of every item. The finest may give each its own.

    Returns:
        ``(level, step)``, in the unit of the distances; levels are numbered from 0, the coarsest.

    Raises:
        ValueError: the dimensions are others, items are missing, or labels do not fit the items, or are not nested.

    Example:
        >>> import stagewise as sw, xarray as xr
        >>> points = [[[0.0], [0.0], [0.0], [0.0]], [[0.0], [0.0], [2.0], [2.0]], [[0.0], [1.0], [2.0], [3.0]]]
        >>> distances = sw.squared_distances(xr.DataArray(points, dims=("step", "item", "unit")))
        >>> sw.separations(distances, [["a", "a", "b", "b"], [0, 1, 2, 3]]).values
        array([[0. , 4. , 3.5],
               [0. , 0. , 1. ]])
    """
    _check_dims(distances, "distances", ("step", "item", "other"))
    distances = _paired(distances)
    values = distances.transpose("step", "item", "other").values
    first, second = np.triu_indices(distances.sizes["item"], 1)
    pairs, together, curves = values[:, first, second], np.ones(len(first), bool), []
    for level, grouping in enumerate(labels):
        names = np.asarray(grouping).astype(str)
        if names.shape != (distances.sizes["item"],):
            raise ValueError(f"labels[{level}]: expected {distances.sizes['item']} labels, got shape {names.shape}")
        same = names[first] == names[second]
        if (same & ~together).any():
            raise ValueError(f"labels[{level}] joins items that a coarser level separates; order levels coarse to fine")
        split = together & ~same
        if not split.any():
            raise ValueError(f"labels[{level}] separates nothing that was together; leave this level out")
        rest = pairs[:, same].mean(1) if same.any() else 0.0
        curves.append(pairs[:, split].mean(1) - rest)
        together = same
    if not curves:
        raise ValueError("labels: got no levels, expected at least one grouping of the items")
    return xr.DataArray(np.stack(curves), {"level": range(len(curves)), "step": distances["step"]}, ("level", "step"))


def _paired(distances: xr.DataArray) -> xr.DataArray:
    """The distances with ``other`` in the order of ``item``."""
    if "item" not in distances.coords or "other" not in distances.coords:
        return distances
    items = distances["item"].values
    if missing := sorted(set(items.tolist()) - set(distances["other"].values.tolist())):
        raise ValueError(f"distances: other lacks {missing[:10]}; expected the distance of every item to every other")
    return distances.sel(other=items)


def _check_dims(array: xr.DataArray, name: str, expected: tuple[str, ...]) -> None:
    if set(array.dims) != set(expected):
        raise ValueError(f"{name} must have dims {expected}, got {array.dims}")
