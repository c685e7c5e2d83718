"""SOURCE: unrolling with the run cut into segments, each of which has one Hessian and one gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from stagewise.baselines.intervals import Interval, intervals, read_run
from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.during import check_during, during_attrs
from stagewise.evaluate import in_any_mode
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.labelled import Array, influence_dataset
from stagewise.task import Task

_LARGEST_DENSE = 6000
_MOST_BYTES = 2**33


@in_any_mode
def source(
    task: Task,
    trajectory: Trajectory | str | Path,
    *,
    segments: int = 3,
    groups: Labels | None = None,
    during: range | None = None,
) -> xr.Dataset:
    """SOURCE (Bae et al. 2024, arXiv 2405.12186) of all training up to each checkpoint.

    The checkpoints before t are cut into ``segments`` runs of equal number. In a segment of K updates the
    Hessian H and the samples' gradients g_i are held at their means over its checkpoints, each of which counts
    by the training up to the next. The response r_i of the weights then obeys, from segment to segment,

        r_i  <-  exp(-eta K H) r_i  -  (1/n) (1 - exp(-eta K H)) H^-1 g_i,        value[i, j](t) = grad l_j(w_t) . r_i

    with eta a diagonal matrix where groups of parameters have learning rates of their own, 0 for what is not updated,
    and shortened where gradients were clipped. The Hessian is the exact one, with its negative eigenvalues, along which
    a response grows. A sample's influence on itself is in it. The Hessians of all checkpoints are held in memory,
    checkpoints * parameters^2 * 8 bytes, of which at most 8 GiB are allowed.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser, or their folder; the run before the first one is not counted.
        segments: number of segments; fewer where there are fewer checkpoints.
        groups: label of every training sample; default ``task.train_groups``, or every candidate alone if there are
            at most 64.
        during: the updates whose sample weights are varied, e.g. ``range(100, 150)``; default all.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight of one sample. Negative
        is helpful. The value is 0 at the first checkpoint. Attribute ``omitted``: the checkpoints that could not be
        used, with reasons (JSON); the one before stands for the updates that follow them.

    Raises:
        ValueError: too many parameters for a dense Hessian or too many Hessians for the memory; no checkpoint can be
            used, with the reasons (the optimizer is not SGD or was not recorded); there are no groups, or ``during`` is
            empty, has gaps or lies outside the checkpoints.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> rule = sw.Optimizer("sgd", 0.1, batch_size=0)
        >>> run = sw.Trajectory.from_checkpoints(sw.Checkpoint(step, task.state(), rule) for step in (0, 5))
        >>> sw.source(task, run).value.shape
        (2, 2, 1)
    """
    if segments < 1:
        raise ValueError(f"segments must be at least 1, got {segments}")
    checkpoints, trained, queried = as_trajectory(trajectory), train_groups(task, groups), query_groups(task)
    run = read_run(task, checkpoints)
    _check_size(run.vector.size, len(run.steps))
    varied = check_during(during, run.steps)
    pieces = intervals(task, checkpoints, run, trained, queried, curvature=True)
    segment = _segments(pieces, segments)
    value = np.zeros((len(pieces), len(trained), len(queried)))
    for now in range(1, len(pieces)):
        response = np.zeros((len(trained), run.vector.size))
        for part in np.array_split(np.arange(now), min(segments, now)):
            first, last = int(part[0]), int(part[-1]) + 1
            if any(interval.rate for interval in pieces[first:last]):
                response = _through(pieces[first:last], segment(first, last), response, varied, len(task.train))
        value[now] = response @ pieces[now].query.T
    attrs = {"estimator": "SOURCE", "segments": segments, **during_attrs(during), **run.found.attrs}
    return influence_dataset(value, None, run.steps, trained, queried, attrs)


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


class Segment(NamedTuple):
    """A stretch of training with one curvature.

    Attributes:
        reach: root of the relative learning rate of every parameter ``(parameters,)``, D.
        curvature: mean Hessian H ``(parameters, parameters)``.
        values: eigenvalues of D H D.
        vectors: its eigenvectors, in columns.
    """

    reach: Array
    curvature: Array
    values: Array
    vectors: Array

    def decayed(self, response: Array, time: float) -> Array:
        """exp(-time D^2 H) of every row of ``response``, written so that D may be 0."""
        return response - time * self.driven(response @ self.curvature, time)

    def driven(self, slope: Array, time: float) -> Array:
        """The mean over a stretch of time of exp(-s D^2 H) D^2 slope, for every row of ``slope``."""
        along = (slope * self.reach) @ self.vectors * saturation(self.values * time)
        moved: Array = along @ self.vectors.T * self.reach
        return moved


def _segments(run: Sequence[Interval], segments: int) -> Callable[[int, int], Segment]:
    """The segment of the intervals ``first <= k < last``."""

    # Cuts move slowly from one checkpoint to the next, so that most segments are met again soon or never.
    @lru_cache(maxsize=2 * segments)
    def segment(first: int, last: int) -> Segment:
        part = run[first:last]
        times = np.array([interval.time() for interval in part]) / sum(interval.time() for interval in part)
        curvature = sum(time * interval.curvature for time, interval in zip(times, part, strict=True))
        reach = np.sqrt(sum(time * interval.relative for time, interval in zip(times, part, strict=True)))
        values, vectors = np.linalg.eigh(reach[:, None] * curvature * reach)
        return Segment(reach, curvature, values, vectors)

    return segment


def _through(part: Sequence[Interval], segment: Segment, response: Array, during: range, n: int) -> Array:
    """The responses ``(train, parameters)`` after a segment, given those before it."""
    driven = sum(interval.time(during) for interval in part)
    after = sum(interval.time(range(during.stop, part[-1].stop)) for interval in part)
    whole = sum(interval.time() for interval in part)
    pushes = (interval.time(during) * interval.relative * interval.train for interval in part)
    # What was pushed along every parameter, over how far the segment reaches along it.
    reach = segment.reach**2
    slope = np.divide(sum(pushes, np.zeros_like(response)), reach, out=np.zeros_like(response), where=reach > 0) / n
    moved: Array = segment.decayed(response, whole) - segment.decayed(segment.driven(slope, driven), after)
    return moved


def saturation(x: Array) -> Array:
    """(1 - exp(-x)) / x, for any sign of x; 1 at 0."""
    zero = x == 0
    ratio: Array = np.where(zero, 1.0, -np.expm1(-x) / np.where(zero, 1.0, x))
    return ratio
