"""Where replays start: a checked task at a checked checkpoint, with its update rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.data import Batch
from stagewise.evaluate import Batching, Point, at, differentiable, gradient, over_rows
from stagewise.retraining.schedule import BatchOrder, LearningRate, Order
from stagewise.retraining.updates import (
    Rule,
    TrainingState,
    keeps_first_moment,
    keeps_second_moment,
    recorded_optimizer,
)
from stagewise.task import Task
from stagewise.vector import ParameterVector

BatchingChoice = Literal["auto", "stacked", "loop"]
"""``"auto"``: stacked, where the model allows it."""


@dataclass(frozen=True, eq=False)
class Start:
    """A checkpoint from which training can go on.

    Attributes:
        point: the task there, as a function of the parameters that have gradients.
        checkpoint: under the model's own names.
        rule: the update rule.
    """

    point: Point
    checkpoint: Checkpoint
    rule: Rule

    @property
    def task(self) -> Task:
        """The task."""
        return self.point.task

    @property
    def step(self) -> int:
        """Number of updates made before."""
        return self.checkpoint.step

    @property
    def params(self) -> Tensor:
        """The checkpoint's weights ``(parameters,)``."""
        return self.point.vector.flatten(self.point.state)

    def state(self, replays: int = 1) -> TrainingState:
        """``replays`` times the checkpoint's weights and optimiser memory.

        Raises:
            ValueError: the checkpoint lacks all moments that its optimizer needs.
        """
        return TrainingState.of(self.checkpoint, self.rule, self.params, replays)

    def recorded(self, step: int, state: TrainingState, learning_rates: Sequence[float] = ()) -> Checkpoint:
        """The first replay after ``step`` updates as a checkpoint, on the CPU."""
        optimizer, vector = self.rule.optimizer, self.point.vector
        updated = {name for name, moves in zip(vector.names, self.rule.updated.tolist(), strict=True) if moves}

        def named(stack: Tensor) -> dict[str, Tensor]:
            return {name: tensor.cpu() for name, tensor in vector.unflatten(stack[0].detach()).items()}

        def moments(stack: Tensor, kept: bool) -> Mapping[str, Tensor]:
            return {name: tensor for name, tensor in named(stack).items() if name in updated} if kept else {}

        counts = zip(vector.names, state.counts[0].tolist(), strict=True)
        return Checkpoint(
            step,
            {name: tensor.cpu() for name, tensor in self.point.state.items()} | named(state.params),
            optimizer,
            first_moment=moments(state.first_moment, keeps_first_moment(optimizer)),
            second_moment=moments(state.second_moment, keeps_second_moment(optimizer)),
            update_counts={
                name: int(count)
                for name, count in counts
                if keeps_second_moment(optimizer) and name in updated and count != step
            },
            learning_rates=tuple(learning_rates),
        )


def start_at(task: Task, checkpoint: Checkpoint, *, curvature: bool = False) -> Start:
    """Check a task and a checkpoint, and find what its next update depends on.

    Args:
        task: the task.
        checkpoint: as it was recorded.
        curvature: whether second derivatives will be used.

    Raises:
        ValueError: the losses cannot be used, or the optimizer was not recorded.
        CheckpointError: the checkpoint is of another model.
    """
    point, fitted = at(task, checkpoint, curvature=curvature)
    optimizer = recorded_optimizer(fitted)
    if optimizer.clip_norm is not None:
        # The norm that decides is that of all gradients, also of parameters that are not updated.
        point = replace(point, vector=ParameterVector.of(task))
    return Start(point, fitted, Rule.of(optimizer, point.vector))


def check_moves(start: Start, learning_rate: LearningRate | None = None) -> None:
    """Refuse a learning rate of 0 that is held.

    Raises:
        ValueError: no parameter would move.
    """
    if learning_rate is None and not start.rule.rates.any():
        raise ValueError(
            f"the learning rate at step {start.step} is 0, as in front of a warm-up: no update follows that data "
            "could change. Start at a later step, or, where it is an argument, pass learning_rate, that of every update"
        )


def check_order(start: Start, order: Order) -> None:
    """Refuse batches that cannot be those of the recorded run.

    Raises:
        ValueError: the order is of another number of samples, names samples that do not exist, or its batches do
            not have the size that the checkpoint's optimizer knows.
    """
    n, recorded = len(start.task.train), start.rule.optimizer.batch_size
    if isinstance(order, BatchOrder) and order.n != n:
        raise ValueError(
            f"order is of {order.n} samples, but there are {n} training samples; pass BatchOrder({n}, ...)"
        )
    batch = order(start.step)
    outside = batch[(batch < 0) | (batch >= n)]
    if len(outside):
        raise ValueError(
            f"order({start.step}) names sample {outside[0].item()}, expected indices from 0 to {n - 1}, those of the "
            f"{n} training samples; pass the order of the run's own training set"
        )
    # Any size from n on is the whole training set, as is 0.
    if recorded is not None and min(len(batch), n) != min(recorded or n, n):
        size = recorded or f"all {n}"
        raise ValueError(
            f"order({start.step}) has {len(batch)} samples, but the checkpoint at step {start.step} was trained with "
            f"{size} per update; pass the run's own order (if its batches differ in size, record the optimizer with "
            "batch_size=None)"
        )


def check_steps(checkpoint: Checkpoint, steps: Sequence[int]) -> list[int]:
    """The steps to look at, refused if replays cannot reach them in this order.

    Raises:
        ValueError: there are none, they do not ascend, or they lie before the start.
    """
    chosen = list(steps)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < checkpoint.step:
        raise ValueError(
            f"steps must ascend without repeats from the start of the replays, step {checkpoint.step}, got {chosen}"
        )
    return chosen


def decided(point: Point, batching: BatchingChoice) -> Batching:
    """How replays are evaluated: as asked for, else stacked if that works and says the same on a few samples.

    Raises:
        torch.OutOfMemoryError: that says nothing of whether the model can be stacked.
    """
    if batching != "auto":
        return batching
    task = point.task
    u = point.vector.flatten(point.state)
    rows = torch.stack([u, 1.01 * u])
    try:
        alike = _alike(point, rows, task.train.batch(task.train.few(), task.device), None)
        for name, data in task.queries.items():
            alike = alike and _alike(point, rows, data.batch(data.few(), task.device), name)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # whatever keeps a model from being traced; if it is something else the loop meets it too
        return "loop"
    return "stacked" if alike else "loop"


def _alike(point: Point, rows: Tensor, batch: Batch, query: str | None) -> bool:
    """Whether losses and their gradients are the same stacked and one by one."""

    def losses(row: Tensor) -> Tensor:
        return torch.stack(point.sample_losses(row, batch, query))

    found = []
    ways: tuple[Batching, ...] = ("stacked", "loop")
    for batching in ways:
        with differentiable(rows) as leaf:
            values = over_rows(losses, leaf, batching)
            found.append((values.detach(), gradient(values[:, 0].sum(), leaf)))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*found, strict=True))
