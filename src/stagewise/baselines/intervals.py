"""A run as its checkpoints see it: between two of them, training is what it is at the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.derivatives import dense, group_gradients, hessian_product
from stagewise.during import WHOLE_RUN
from stagewise.evaluate import at
from stagewise.groups import Groups
from stagewise.labelled import Array
from stagewise.sampling.metric import clip_factor
from stagewise.task import Task
from stagewise.usable import Found, at_usable
from stagewise.vector import ParameterVector


@dataclass(frozen=True, eq=False)
class Interval:
    """The updates ``start <= step < stop`` that follow a checkpoint; none after the last checkpoint.

    Attributes:
        start: step of the checkpoint.
        stop: step of the next one.
        rate: how far an update goes along minus the gradient, for the parameters that go farthest.
        relative: the same of every parameter over ``rate`` ``(parameters,)``; 0 where it is not updated.
        train: gradient by the weight of every train group, times the training samples ``(train, parameters)``, in nats
            per unit.
        query: gradient of every query group's mean loss ``(query, parameters)``.
        curvature: Hessian of the objective ``(parameters, parameters)``, if asked for.
    """

    start: int
    stop: int
    rate: float
    relative: Array
    train: Array
    query: Array
    curvature: Array | None

    def time(self, during: range = WHOLE_RUN) -> float:
        """Learning rate times the number of updates within the range."""
        return self.rate * max(0, min(self.stop, during.stop) - max(self.start, during.start))


class Run(NamedTuple):
    """What all checkpoints of a run have in common.

    Attributes:
        steps: of the checkpoints that can be used, ascending.
        vector: all parameters that are updated at any of them.
        found: the same, and why the others were left out.
    """

    steps: list[int]
    vector: ParameterVector
    found: Found[frozenset[str]]


def read_run(task: Task, trajectory: Trajectory) -> Run:
    """Find the checkpoints that can be used.

    Raises:
        ValueError: there are no checkpoints, or none can be used: the optimizer is not SGD or was not recorded, or the
            checkpoint is of another model.
    """
    if not trajectory.steps:
        raise ValueError("the trajectory has no checkpoints; record some, with stagewise.Recorder for instance")

    def moving(step: int) -> frozenset[str]:
        point, checkpoint = at(task, trajectory.load(step))
        _sgd(checkpoint)
        return frozenset(point.vector.names)

    found = at_usable(trajectory, None, moving)
    return Run(found.steps, ParameterVector.of(task, updated=frozenset().union(*found.results)), found)


def intervals(
    task: Task, trajectory: Trajectory, run: Run, trained: Groups, queried: Groups, *, curvature: bool = False
) -> list[Interval]:
    """One interval per checkpoint that can be used."""
    found = []
    for start, stop in pairwise([*run.steps, run.steps[-1]]):
        point, checkpoint = at(task, trajectory.load(start), curvature=curvature)
        point = replace(point, vector=run.vector)
        u, optimizer = run.vector.flatten(point.state), _sgd(checkpoint)
        groups = [optimizer.group_of(name) for name in run.vector.names]
        # With momentum b every gradient is followed for 1 + b + b^2 + ... updates.
        rates = run.vector.spread(_numbers([g.learning_rate for g in groups])).numpy() / (1 - optimizer.momentum)
        rate = float(rates.max())
        clip = clip_factor(point, optimizer)
        bend = None
        if curvature and stop > start:
            # Weight decay pulls on a parameter whatever the samples: a curvature without any, which is not clipped.
            decays = run.vector.spread(_numbers([g.weight_decay for g in groups])).numpy()
            bend = clip * _array(dense(hessian_product(point, u), u)) + np.diag(decays)
        found.append(
            Interval(
                start,
                stop,
                rate,
                rates / rate if rate else np.ones_like(rates),
                clip * _array(group_gradients(point, u, trained)),
                _array(group_gradients(point, u, queried)),
                bend,
            )
        )
    return found


def _sgd(checkpoint: Checkpoint) -> Optimizer:
    """The update rule, along the gradient."""
    optimizer = checkpoint.optimizer
    if optimizer is None:
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} does not say which optimizer it was trained with; save "
            "checkpoints with stagewise.Recorder, which stores it beside the weights"
        )
    if optimizer.name != "sgd":
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} was trained with {optimizer.name}, but TracIn and SOURCE "
            "describe updates along the gradient (SGD, with or without momentum); use unrolled_influence, which "
            "goes through the run's own updates"
        )
    return optimizer


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.cpu().double().numpy()
    return array
