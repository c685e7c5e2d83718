"""SOURCE: unrolling with the run cut into segments, each of which has one Hessian and one gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.retraining.intervals import Array, Interval, intervals
from stagewise.retraining.labelled import influence_dataset
from stagewise.retraining.schedule import check_window
from stagewise.task import Task
from stagewise.vector import ParameterVector

_LARGEST_DENSE = 6000
_MOST_BYTES = 2**33


def source(
    task: Task,
    trajectory: Trajectory,
    *,
    segments: int = 3,
    groups: Labels | None = None,
    window: range | None = None,
) -> xr.Dataset:
    """SOURCE (Bae et al. 2024, arXiv 2405.12186) of all training up to each checkpoint.

    The checkpoints before t are cut into ``segments`` runs of equal number. In a segment of K updates the
    Hessian H and the samples' gradients g_i are held at their means over its checkpoints, each of which counts
    by the training up to the next. The response r_i of the weights then obeys, from segment to segment,

        r_i  <-  exp(-eta K H) r_i  -  (1/n) (1 - exp(-eta K H)) H^-1 g_i,        value[i, j](t) = grad l_j(w_t) . r_i

    The Hessian is the exact one, with its negative eigenvalues, along which a response grows. The Hessians of all
    checkpoints are held in memory, checkpoints * parameters^2 * 8 bytes, of which at most 8 GiB are allowed.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser; the run before the first one is not counted.
        segments: number of segments; fewer where there are fewer checkpoints.
        groups: label of every training sample; default ``task.train_groups``, or every sample alone in a set
            of at most 64.
        window: the updates whose sample weights are varied, e.g. ``range(100, 150)``; default all.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight of one sample. Negative
        is helpful. The value is 0 at the first checkpoint.

    Raises:
        ValueError: too many parameters for a dense Hessian or too many Hessians for the memory, the optimizer is
            not SGD or was not recorded, there are no groups, or the window is empty, has gaps or lies outside the
            checkpoints.
        CheckpointError: a checkpoint is of another model.
    """
    if segments < 1:
        raise ValueError(f"segments must be at least 1, got {segments}")
    size = ParameterVector.of(task).size
    _check_size(size, len(trajectory.steps))
    trained, queried, varied = train_groups(task, groups), query_groups(task), check_window(window, trajectory.steps)
    run, curvatures = _accumulated(intervals(task, trajectory, trained, queried, curvature=True))
    spectrum = _spectra(run, curvatures, segments)
    value = np.zeros((len(run), len(trained), len(queried)))
    for now in range(1, len(run)):
        response = np.zeros((len(trained), size))
        for piece in np.array_split(np.arange(now), min(segments, now)):
            first, last = int(piece[0]), int(piece[-1]) + 1
            response = _through(run[first:last], spectrum(first, last), response, varied, len(task.train))
        value[now] = response @ run[now].query.T
    attrs = {"estimator": "SOURCE", "segments": segments}
    attrs |= {"window": [window.start, window.stop]} if window else {}
    return influence_dataset(value, trajectory.steps, trained, queried, attrs)


def _check_size(size: int, checkpoints: int) -> None:
    if size > _LARGEST_DENSE:
        raise ValueError(
            f"source needs the dense {size} x {size} Hessian of every checkpoint, at most {_LARGEST_DENSE} "
            "parameters are allowed; use unrolled_influence or tracin, or let fewer parameters move"
        )
    if (memory := checkpoints * size**2 * 8) > _MOST_BYTES:
        raise ValueError(
            f"source holds the {size} x {size} Hessians of {checkpoints} checkpoints, {memory / 2**30:.3g} GiB, and "
            f"at most {_MOST_BYTES / 2**30:.3g} GiB are allowed; pass a trajectory of fewer checkpoints, or let fewer "
            "parameters move"
        )


Spectrum = tuple[Array, Array]
"""Eigenvalues ``(parameters,)``, and eigenvectors in columns."""


def _accumulated(run: Iterable[Interval]) -> tuple[list[Interval], list[Array]]:
    """The intervals without their Hessians, and the sum over the first k of time times Hessian, for every k."""
    kept, sums = [], [np.zeros(())]
    for interval in run:
        kept.append(replace(interval, curvature=None))
        if interval.curvature is not None:
            sums.append(sums[-1] + interval.time() * interval.curvature)
    return kept, sums


def _spectra(run: Sequence[Interval], sums: Sequence[Array], segments: int) -> Callable[[int, int], Spectrum]:
    """Spectrum of the mean Hessian of the intervals ``first <= k < last``."""

    # Cuts move slowly from one checkpoint to the next, so that most segments are met again soon or never.
    @lru_cache(maxsize=2 * segments)
    def spectrum(first: int, last: int) -> Spectrum:
        time = sum(interval.time() for interval in run[first:last])
        values, vectors = np.linalg.eigh((sums[last] - sums[first]) / time)
        return values, vectors

    return spectrum


def _through(segment: Sequence[Interval], spectrum: Spectrum, response: Array, window: range, n: int) -> Array:
    """The responses ``(train, parameters)`` after a segment, given those before it."""
    values, vectors = spectrum
    driven = sum(interval.time(window) for interval in segment)
    after = sum(interval.time(range(window.stop, segment[-1].stop)) for interval in segment)
    whole = sum(interval.time() for interval in segment)
    drive = sum((interval.time(window) * interval.train for interval in segment), np.zeros_like(response)) / n
    kept = (response @ vectors) * np.exp(-values * whole)
    added = (drive @ vectors) * saturation(values * driven) * np.exp(-values * after)
    moved: Array = (kept - added) @ vectors.T
    return moved


def saturation(x: Array) -> Array:
    """(1 - exp(-x)) / x, for any sign of x; 1 at 0."""
    zero = x == 0
    ratio: Array = np.where(zero, 1.0, -np.expm1(-x) / np.where(zero, 1.0, x))
    return ratio
