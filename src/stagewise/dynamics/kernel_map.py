"""A map of the samples from their loss kernel, at every step in the frame of the step before."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.linalg import eigh, orthogonal_procrustes

Floats = NDArray[np.float64]


def influence_map(kernel: xr.Dataset, *, axes: int = 2) -> xr.Dataset:
    """Positions of the samples by classical scaling of the dissimilarity 1 - R, followed over training.

    1 - R is half the squared distance between two losses in units of their own spread, so that as many axes as there
    are samples hold it exactly. Every step is turned (rotated, perhaps mirrored) to lie as near as possible to the one
    before, by orthogonal Procrustes; what turns all samples together is not seen. At the first step the axes are the
    principal ones, largest first, and of the positions of at least half the largest size the first is positive.

    Noise moves every position, and spreads samples that the model does not tell apart. Where more directions are about
    as wide as those that are kept, the plane itself is in doubt, and all standard errors are large, while who lies near
    whom is not: look at errors and shares before you name what an axis is.

    Args:
        kernel: ``value`` ``(step, sample, other)``, symmetric, and perhaps ``replicates``
            ``(step, replicate, sample, other)``, as from :func:`stagewise.loss_kernel`.
        axes: how many.

    Returns:
        Dataset with ``value`` ``(step, sample, axis)``, centred at every step, where 1 is the spread of a loss and two
        uncorrelated samples are sqrt(2) apart; ``share`` ``(step, axis)``, of all spread between samples, the part
        along each axis; and, where the kernel has replicates, ``stderr`` ``(step, sample, axis)``, jackknife over
        them, each turned to the estimate. Coordinates of samples are kept.

    Raises:
        ValueError: the kernel is malformed or not symmetric, or there are not more samples than axes.

    Example:
        >>> import numpy as np, stagewise as sw, xarray as xr
        >>> places = np.array([0.0, 1.0, 3.0])
        >>> value = 1 - (places[:, None] - places) ** 2 / 2
        >>> kernel = xr.Dataset({"value": (("step", "sample", "other"), value[None])}, {"step": [0]})
        >>> sw.influence_map(kernel, axes=1).value.values[0, :, 0].round(2)
        array([ 1.33,  0.33, -1.67])
    """
    values = _checked(kernel, axes)
    replicates = None
    if "replicates" in kernel:
        replicates = kernel["replicates"].transpose("step", "replicate", "sample", "other").values
    positions: list[Floats] = []
    shares, errors = [], []
    for k, matrix in enumerate(values):
        gram = _gram(matrix)
        place = _places(gram, axes)
        place = _turned(place, positions[-1]) if positions else place * _signs(place)
        positions.append(place)
        shares.append((place**2).sum(0) / (np.trace(gram) or 1.0))
        if replicates is not None:
            errors.append(_jackknife(replicates[k], place))
    numbers: dict[str, Any] = {
        "value": (("step", "sample", "axis"), np.stack(positions)),
        "share": (("step", "axis"), np.stack(shares)),
    }
    if replicates is not None:
        numbers["stderr"] = (("step", "sample", "axis"), np.stack(errors))
    kept = {name: at for name, at in kernel.coords.items() if set(at.dims) <= {"step", "sample"}}
    facts = {name: kernel.attrs[name] for name in ("omitted", "n_beta", "window", "metric") if name in kernel.attrs}
    return xr.Dataset(numbers, {**kept, "axis": range(axes)}, facts | {"units": "1"})


def _checked(kernel: xr.Dataset, axes: int) -> Floats:
    """The matrices ``(step, sample, sample)``."""
    dims = ("step", "sample", "other")
    if "value" not in kernel or set(kernel["value"].dims) != set(dims):
        got = dict(kernel["value"].sizes) if "value" in kernel else sorted(map(str, kernel.data_vars))
        raise ValueError(f"kernel must have value {dims}, got {got}; make one by loss_kernel(traces)")
    values: Floats = kernel["value"].transpose(*dims).values.astype(np.float64)
    if values.shape[1] != values.shape[2] or not np.allclose(values, values.swapaxes(1, 2), rtol=0, atol=1e-6):
        raise ValueError(f"kernel must be finite and the same both ways, got {values.shape[1:]} samples and others")
    if not 0 < axes < values.shape[1]:
        raise ValueError(f"axes must be at least 1 and fewer than the {values.shape[1]} samples, got {axes}")
    return values


def _gram(matrix: Floats) -> Floats:
    """Inner products of the centred positions whose squared distances are 2 (1 - R), and 0 of a sample to itself."""
    squared = 2 * (1 - matrix)
    np.fill_diagonal(squared, 0.0)
    means = squared.mean(1)
    gram: Floats = -(squared - means[:, None] - means + means.mean()) / 2
    return gram


def _places(gram: Floats, axes: int) -> Floats:
    """The principal axes, largest first; nothing along those that noise made negative."""
    sizes, vectors = eigh(gram, subset_by_index=[len(gram) - axes, len(gram) - 1])
    places: Floats = (vectors * np.sqrt(np.maximum(sizes, 0.0)))[:, ::-1]
    return places


def _turned(places: Floats, to: Floats) -> Floats:
    turned: Floats = places @ orthogonal_procrustes(places, to)[0]
    return turned


def _signs(places: Floats) -> Floats:
    """By which each axis is to be multiplied."""
    size = np.abs(places)
    first = (size >= size.max(0) / 2).argmax(0)
    return np.where(places[first, np.arange(places.shape[1])] < 0, -1.0, 1.0)


def _jackknife(replicates: Floats, places: Floats) -> Floats:
    """Standard errors from the maps that leave out one replicate each, turned to the map of all."""
    left_out = (replicates.sum(0) - replicates) / (len(replicates) - 1)
    maps = np.stack([_turned(_places(_gram(matrix), places.shape[1]), places) for matrix in left_out])
    stderr: Floats = maps.std(0) * np.sqrt(len(maps) - 1)
    return stderr
