"""How much of an influence matrix is a single direction: the mark of a transition between two phases."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.dynamics.curves import checked

Floats = NDArray[np.float64]


def top_eigenvalue_share(influence: xr.Dataset) -> xr.Dataset:
    """Share of the dominant eigenvalue of the centred influence matrix at every step, and its eigenvector.

    While a posterior is divided between two phases, influence gains the term -kappa pi (1 - pi) Delta_i Delta_j, of
    rank one, where Delta_i is the difference of sample i's loss between the phases. The matrix is made symmetric and
    both its means are taken out, so that what all samples have in common does not count.

    Noise spreads over all eigenvalues and lowers the share; of pure noise it is about 2.4 / n for many labels n.
    Standard errors (jackknife over replicates) tell the scatter, not this bias, and are left out where the influence
    has errors but no replicates.

    Args:
        influence: ``value`` and ``stderr`` ``(step, train, query)`` with the same labels on both sides, and perhaps
            ``replicates`` ``(step, replicate, train, query)``. Of its coordinate ``train_size``, if it has one, all
            sizes must be 1 or none: a sample alone has its own variance on the diagonal, while groups leave the
            pairs of a sample with itself out, so that single samples among groups would be all that is seen.

    Returns:
        Dataset with ``share`` and ``stderr`` ``(step)``, the largest ``|eigenvalue|`` over the sum of all, between 0
        and 1 (0 for a matrix that is constant), and ``direction`` and ``direction_stderr`` ``(step, train)``, the
        eigenvector of length 1 (0 for a constant). Its sign says nothing and is fixed: of the entries of at least
        half the largest size, the first is positive.

    Raises:
        ValueError: the influence is malformed, fewer than three labels, train and query differ in labels, or single
            samples are mixed with groups of several.

    Example:
        >>> import numpy as np, stagewise as sw, xarray as xr
        >>> value = -np.outer([1.0, 1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -1.0])[None]
        >>> dims = ("step", "train", "query")
        >>> influence = xr.Dataset(
        ...     {"value": (dims, value), "stderr": (dims, 0 * value)},
        ...     {"step": [0], "train": range(4), "query": range(4)},
        ... )
        >>> sw.top_eigenvalue_share(influence).direction.values.round(2)
        array([[ 0.5,  0.5, -0.5, -0.5]])
    """
    influence = checked(influence, level=0.95)
    _check_sizes(influence)
    influence = _square(influence)
    share, direction = _top(influence["value"].values)
    doubts = _doubts(influence, direction)
    numbers: dict[str, Any] = {"share": ("step", share), "direction": (("step", "train"), direction)}
    if doubts is not None:
        numbers |= {"stderr": ("step", doubts[0]), "direction_stderr": (("step", "train"), doubts[1])}
    return xr.Dataset(numbers, {"step": influence["step"], "train": influence["train"]}, {"units": "1"})


def _check_sizes(influence: xr.Dataset) -> None:
    if "train_size" not in influence.coords:
        return
    single = influence["train_size"].values == 1
    if single.any() and not single.all():
        raise ValueError(
            f"groups {influence['train'].values[single].tolist()[:10]} are single samples among groups of several, and "
            "their own variance on the diagonal would be all that is seen; leave single-sample groups out, or take "
            "every sample alone"
        )


def _square(influence: xr.Dataset) -> xr.Dataset:
    """The influence with its queries in the order of the training labels, compared as text."""
    labels, queries = ([str(label) for label in influence[dim].values.tolist()] for dim in ("train", "query"))
    if len(set(labels)) < max(3, len(labels)) or sorted(labels) != sorted(queries):
        raise ValueError(
            f"expected the same three or more labels for train and query, got {labels[:10]} and {queries[:10]}; "
            "measure the influence of the training groups on themselves, or rename the queries"
        )
    return influence.isel(query=[queries.index(label) for label in labels])


def _top(matrices: Floats) -> tuple[Floats, Floats]:
    """Share and eigenvector of matrices ``(..., label, label)``."""
    symmetric = (matrices + matrices.swapaxes(-1, -2)) / 2
    means = symmetric.mean(-1, keepdims=True)
    centred = symmetric - means - means.swapaxes(-1, -2) + means.mean(-2, keepdims=True)
    values, vectors = np.linalg.eigh(centred)
    sizes = np.abs(values)
    top = sizes.argmax(-1)[..., None]
    total = sizes.sum(-1)
    rounding = 1e-13 * np.abs(matrices).sum((-1, -2))
    varied = total > rounding
    share = np.divide(sizes.max(-1), total, out=np.zeros_like(total), where=varied)
    direction = np.take_along_axis(vectors, top[..., None], -1)[..., 0] * varied[..., None]
    large = np.abs(direction) >= np.abs(direction).max(-1, keepdims=True) / 2
    sign = np.sign(np.take_along_axis(direction, large.argmax(-1)[..., None], -1))
    return share, direction * sign


def _doubts(influence: xr.Dataset, direction: Floats) -> tuple[Floats, Floats] | None:
    """Standard errors of share and direction; None if unknown."""
    if "replicates" not in influence:
        exact = not influence["stderr"].any()
        return (np.zeros(len(direction)), np.zeros_like(direction)) if exact else None
    replicates = influence["replicates"].transpose("replicate", "step", "train", "query").values
    count = len(replicates)
    shares, directions = _top((replicates.sum(0) - replicates) / (count - 1))
    # The sign of an eigenvector may jump from one to the next.
    directions = directions * np.where((directions * direction).sum(-1, keepdims=True) < 0, -1.0, 1.0)
    return _jackknife_stderr(shares), _jackknife_stderr(directions)


def _jackknife_stderr(left_out: Floats) -> Floats:
    """From the estimates that leave out one replicate each, along the first axis."""
    stderr: Floats = left_out.std(0) * np.sqrt(len(left_out) - 1)
    return stderr
