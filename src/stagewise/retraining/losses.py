"""Replays that continue from one checkpoint, and what their queries lose along the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stagewise.attention import slow_path
from stagewise.data import Batch
from stagewise.evaluate import Batching, Point, over_rows
from stagewise.groups import Groups, query_groups
from stagewise.retraining.schedule import LearningRate, Order, Schedule
from stagewise.retraining.start import Start
from stagewise.retraining.training import train

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def losses_along(
    start: Start,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    batching: Batching,
    learning_rate: LearningRate | None = None,
) -> Tensor:
    """Train one stack of replays on; mean loss of every query group at ``steps``, in nats.

    Without ``learning_rate`` it is the run's own where it is known, else the checkpoint's, held.

    Returns:
        ``(step, replay, query)``, float64, on the CPU.
    """
    queried, state, losses = query_groups(start.task), start.state(len(schedules)), []
    for before, step in pairwise([start.step, *steps]):
        span = range(before, step)
        state = train(start, state, schedules, order, span, batching=batching, learning_rate=learning_rate)
        losses.append(query_losses(start.point, state.params, queried, batching))
    return torch.stack(losses)


def paired_losses(
    start: Start,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    max_replays: int,
    batching: Batching,
    learning_rate: LearningRate | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """What each schedule does to the queries, against a replay without any change.

    Without ``learning_rate`` it is the run's own where it is known, else the checkpoint's, held.

    Returns:
        Changed minus unchanged loss ``(step, schedule, query)``, and the unchanged loss ``(step, query)``.
    """
    effects, unchanged = [], []
    # Every stack has its own unchanged replay: differences within a stack are free of its rounding.
    for first in range(0, len(schedules), max_replays - 1):
        stack = [Schedule(), *schedules[first : first + max_replays - 1]]
        losses = losses_along(start, stack, order, steps, batching=batching, learning_rate=learning_rate)
        effects.append(losses[:, 1:] - losses[:, :1])
        unchanged.append(losses[:, 0])
        if progress is not None:
            progress(min(first + max_replays - 1, len(schedules)), len(schedules))
    return torch.cat(effects, 1), unchanged[0]


def query_losses(point: Point, params: Tensor, queried: Groups, batching: Batching) -> Tensor:
    """Mean loss of every query group at several places ``(replays, parameters)``.

    Returns:
        ``(replays, query)``, float64, on the CPU.
    """
    losses, weights = {}, {}
    for name in point.task.queries:
        seen = _losses_and_weights(point, params, name, queried.widths.get(name, 0), batching)
        losses[name], weights[name] = seen[:, 0], seen[0, 1]
    return queried.mean(losses, weights)


def _losses_and_weights(point: Point, params: Tensor, query: str, tokens: int, batching: Batching) -> Tensor:
    """``(replays, 2, samples)``, or ``(replays, 2, samples * tokens)``; float64, on the CPU."""
    task = point.task

    def of_replays(batch: Batch) -> Tensor:
        return over_rows(lambda row: torch.stack(point.grouped_losses(row, batch, query, tokens)), params, batching)

    with torch.no_grad(), slow_path():
        parts = [of_replays(batch).cpu() for batch in task.queries[query].batches(task.forward_batch, task.device)]
    return torch.cat(parts, 2).double()
