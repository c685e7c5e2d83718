"""Runs that continue from one checkpoint, and what their queries lose along the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.groups import Groups, per_sample, query_groups
from stagewise.retraining.schedule import BatchOrder, LearningRate, Order, Schedule
from stagewise.retraining.training import Batching, train
from stagewise.retraining.updates import TrainingState, recorded_optimizer
from stagewise.task import Batch, Params, Task
from stagewise.vector import ParameterVector

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def losses_along(
    task: Task,
    start: Checkpoint,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    batching: Batching,
    learning_rate: LearningRate | None = None,
) -> Tensor:
    """Train one stack of runs on from ``start``; mean loss of every query group at ``steps``, in nats.

    The learning rate is the checkpoint's, held, unless ``learning_rate`` gives that of every update.

    Returns:
        ``(step, run, query)``.
    """
    vector, queried, optimizer = ParameterVector.of(task), query_groups(task), recorded_optimizer(start)
    fixed = fixed_tensors(task, vector, start)
    state = TrainingState.from_checkpoint(start, vector, len(schedules), task.device)
    losses = []
    for before, step in pairwise([start.step, *steps]):
        span = range(before, step)
        state = train(
            task,
            vector,
            state,
            optimizer,
            schedules,
            order,
            span,
            fixed=fixed,
            batching=batching,
            learning_rate=learning_rate,
        )
        losses.append(query_losses(task, vector, state.params, fixed, queried, batching))
    return torch.stack(losses)


def paired_losses(
    task: Task,
    start: Checkpoint,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    max_runs: int,
    batching: Batching,
    learning_rate: LearningRate | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """What each schedule does to the queries, against a run without any change.

    The learning rate is the checkpoint's, held, unless ``learning_rate`` gives that of every update.

    Returns:
        Changed minus unchanged loss ``(step, schedule, query)``, and the unchanged loss ``(step, query)``.
    """
    effects, unchanged = [], []
    # Every stack has its own unchanged run: differences within a stack are free of its rounding.
    for first in range(0, len(schedules), max_runs - 1):
        runs = [Schedule(), *schedules[first : first + max_runs - 1]]
        losses = losses_along(task, start, runs, order, steps, batching=batching, learning_rate=learning_rate)
        effects.append(losses[:, 1:] - losses[:, :1])
        unchanged.append(losses[:, 0])
        if progress is not None:
            progress(min(first + max_runs - 1, len(schedules)), len(schedules))
    return torch.cat(effects, 1), unchanged[0]


def query_losses(
    task: Task,
    vector: ParameterVector,
    params: Tensor,
    fixed: Params,
    queried: Groups,
    batching: Batching = "stacked",
) -> Tensor:
    """Mean loss of every query group at every run's parameters ``(runs, parameters)``: ``(runs, query)``."""

    def losses(run: Tensor, batch: Batch) -> Tensor:
        return per_sample(task.losses({**fixed, **vector.unflatten(run)}, batch))

    def of_runs(batch: Batch) -> Tensor:
        if batching == "stacked":
            return torch.func.vmap(lambda run: losses(run, batch))(params)
        return torch.stack([losses(run, batch) for run in params])

    with torch.no_grad():
        by_sample = {
            name: torch.cat([of_runs(batch) for batch in samples.batches(task.forward_batch, task.device)], 1)
            for name, samples in task.queries.items()
        }
        return queried.mean(by_sample)


def fixed_tensors(task: Task, vector: ParameterVector, start: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's parameters and buffers that do not move, on the task's device."""
    return {name: tensor.to(task.device) for name, tensor in vector.fixed(start.params).items()}


def check_order(task: Task, start: Checkpoint, order: Order) -> None:
    """Refuse batches that cannot be those of the recorded run.

    Raises:
        ValueError: the order is of another number of samples, names samples that do not exist, or its batches do
            not have the size that the checkpoint's optimizer knows; or the optimizer was not recorded.
    """
    n, recorded = len(task.train), recorded_optimizer(start).batch_size
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


def check_steps(start: Checkpoint, steps: Sequence[int]) -> list[int]:
    """The steps to look at, refused if the runs cannot reach them in this order.

    Raises:
        ValueError: there are none, they do not ascend, or they lie before the start.
    """
    chosen = list(steps)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < start.step:
        raise ValueError(
            f"steps must ascend without repeats from the start of the runs, step {start.step}, got {chosen}"
        )
    return chosen
