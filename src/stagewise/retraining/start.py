"""Where replays start: a checked task at a checked checkpoint, with its update rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.evaluate import Batching, Point, at
from stagewise.retraining.schedule import BatchOrder, LearningRate, Order, RecordedOrder
from stagewise.retraining.updates import (
    Rule,
    TrainingState,
    keeps_first_moment,
    keeps_second_moment,
    recorded_optimizer,
)
from stagewise.stacking import BatchingChoice, decided
from stagewise.task import Task
from stagewise.vector import ParameterVector


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

    def decided(self, batching: BatchingChoice, replays: int) -> Batching:
        """How so many replays are evaluated, see :func:`stagewise.stacking.decided`."""
        return decided(self.point, batching, replays, self.rule.optimizer.batch_size)

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
    # A window uses a few of the training samples, of which there may be very many. A loss of theirs that is not finite
    # goes into the weights, and what is asked of these is refused.
    point, fitted = at(task, checkpoint, curvature=curvature, train=False)
    optimizer = recorded_optimizer(fitted)
    if optimizer.clip_norm is not None:
        # The norm that decides is that of all gradients, also of parameters that are not updated.
        point = replace(point, vector=ParameterVector.of(task))
    return Start(point, fitted, Rule.of(optimizer, point.vector, fitted.step, fitted.coming_rates))


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
    if isinstance(order, RecordedOrder):
        # What the run did is known update by update: the last batch of an epoch may be smaller.
        _check_samples(f"a batch recorded from step {start.step} on", torch.cat(order.batches), n)
        return
    if isinstance(order, BatchOrder) and order.n != n:
        raise ValueError(
            f"order is of {order.n} samples, but there are {n} training samples; pass BatchOrder({n}, ...)"
        )
    batch = order(start.step)
    _check_samples(f"order({start.step})", batch, n)
    # Any size from n on is the whole training set, as is 0.
    if recorded is not None and min(len(batch), n) != min(recorded or n, n):
        size = recorded or f"all {n}"
        raise ValueError(
            f"order({start.step}) has {len(batch)} samples, but the checkpoint at step {start.step} was trained with "
            f"{size} per update; pass the run's own order (if its batches differ in size, record the optimizer with "
            "batch_size=None)"
        )


def own_order(start: Start, window: int) -> RecordedOrder | None:
    """The run's own batches of the next ``window`` updates, None where not all of them were recorded.

    Raises:
        ValueError: they name samples that do not exist.
    """
    batches = start.checkpoint.coming_batches[:window]
    if len(batches) < window:
        return None
    order = RecordedOrder(start.step, batches)
    check_order(start, order)
    return order


def _check_samples(name: str, samples: Tensor, n: int) -> None:
    outside = samples[(samples < 0) | (samples >= n)]
    if len(outside):
        raise ValueError(
            f"{name} names sample {outside[0].item()}, expected indices from 0 to {n - 1}, those of the {n} training "
            "samples; pass the order of the run's own training set"
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
