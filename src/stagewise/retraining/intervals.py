"""A run as its checkpoints see it: between two of them, training is what it is at the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory, check_fits
from stagewise.groups import Groups
from stagewise.retraining.derivatives import group_gradients, hessian
from stagewise.retraining.schedule import WHOLE_RUN
from stagewise.retraining.updates import recorded_optimizer
from stagewise.task import Task
from stagewise.vector import ParameterVector

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Interval:
    """The updates ``start <= step < stop`` that follow a checkpoint; none after the last checkpoint.

    Attributes:
        start: step of the checkpoint.
        stop: step of the next one.
        rate: how far an update goes along minus the gradient.
        train: gradient of every train group's mean loss ``(train, parameters)``, in nats per unit.
        query: the same of every query group ``(query, parameters)``.
        curvature: Hessian of the objective ``(parameters, parameters)``, if asked for.
    """

    start: int
    stop: int
    rate: float
    train: Array
    query: Array
    curvature: Array | None

    def time(self, window: range = WHOLE_RUN) -> float:
        """Learning rate times the number of updates within the window."""
        return self.rate * max(0, min(self.stop, window.stop) - max(self.start, window.start))


def intervals(
    task: Task, trajectory: Trajectory, trained: Groups, queried: Groups, *, curvature: bool = False
) -> Iterator[Interval]:
    """One interval per checkpoint.

    Raises:
        ValueError: there are no checkpoints, or one lacks its optimizer, or it is not SGD.
        CheckpointError: a checkpoint is of another model.
    """
    if not trajectory.steps:
        raise ValueError("the trajectory has no checkpoints; record some, with stagewise.Recorder for instance")
    vector = ParameterVector.of(task)
    for start, stop in pairwise([*trajectory.steps, trajectory.steps[-1]]):
        checkpoint = trajectory.load(start)
        check_fits(task, checkpoint)
        state = {name: tensor.to(task.device) for name, tensor in checkpoint.params.items()}
        params, fixed = vector.flatten(state), vector.fixed(state)
        rate, decay = _gradient_steps(checkpoint)
        bend = None
        if curvature and stop > start:
            # Weight decay pulls on every parameter alike: a curvature without any sample.
            bend = _array(hessian(task, vector, params, fixed)) + decay * np.eye(vector.size)
        train = group_gradients(task, vector, params, fixed, trained, {"train": task.train})
        query = group_gradients(task, vector, params, fixed, queried, task.queries)
        yield Interval(start, stop, rate, _array(train), _array(query), bend)


def _gradient_steps(checkpoint: Checkpoint) -> tuple[float, float]:
    """Length of an update in units of the gradient, and the weight decay."""
    optimizer = recorded_optimizer(checkpoint)
    if optimizer.name != "sgd":
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} was trained with {optimizer.name}, but TracIn and SOURCE "
            "describe updates along the gradient (SGD, with or without momentum); use unrolled_influence, which "
            "goes through the run's own updates"
        )
    # With momentum b every gradient is followed for 1 + b + b^2 + ... updates.
    return optimizer.learning_rate / (1 - optimizer.momentum), optimizer.weight_decay


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.double().cpu().numpy()
    return array
