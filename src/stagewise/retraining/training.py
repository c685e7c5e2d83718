"""Training many runs at once, exactly as the recorded run was trained.

All runs share start and batches and differ only in the weights of the samples, so that their differences are
effects of the data and not of chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.groups import per_sample
from stagewise.retraining.schedule import LearningRate, Order, Schedule
from stagewise.retraining.updates import TrainingState, update
from stagewise.task import Batch, Params, Task
from stagewise.vector import ParameterVector

Batching = Literal["stacked", "loop"]
"""All runs in one ``torch.func.vmap``, or one by one: for models that vmap cannot trace or that are large."""


def train(
    task: Task,
    vector: ParameterVector,
    state: TrainingState,
    optimizer: Optimizer,
    schedules: Sequence[Schedule],
    order: Order,
    steps: range,
    on_step: Callable[[int, TrainingState], None] | None = None,
    *,
    fixed: Params | None = None,
    batching: Batching = "stacked",
    learning_rate: LearningRate | None = None,
) -> TrainingState:
    """Make the updates ``steps`` on all runs.

    Args:
        task: the model, its losses and the training data.
        vector: the parameters that move.
        state: where the runs stand after ``steps.start`` updates.
        optimizer: the update rule.
        schedules: the sample weights of each run.
        order: the samples of every update, the same for all runs.
        steps: the updates to make.
        on_step: called after every update with the number of updates made and the state.
        fixed: parameters and buffers that do not move; those left out keep the model's own value.
        batching: how the runs are evaluated.
        learning_rate: of the update made at ``step``; default: the optimizer's, held for all ``steps``.

    Returns:
        The state after ``steps.stop`` updates.

    Raises:
        ValueError: the number of schedules is not the number of runs, or a learning rate is negative or not finite.
    """
    if len(schedules) != len(state.params):
        raise ValueError(f"expected one schedule for each of {len(state.params)} runs, got {len(schedules)}")
    n = len(task.train)
    for span in constant_spans(steps, schedules):
        weights = torch.stack([schedule.weights(span.start, n) for schedule in schedules]).to(state.params)
        for step in span:
            index = order(step)
            objective = _objective(task, vector, task.train.batch(index, task.device), fixed or {})
            gradient = _gradient(objective, state.params, weights[:, index.to(weights.device)], batching)
            state = update(optimizer, state, gradient, step, learning_rate)
            if on_step is not None:
                on_step(step + 1, state)
    return state


def train_and_record(task: Task, optimizer: Optimizer, order: Order, steps: Iterable[int]) -> Iterator[Checkpoint]:
    """Train the task's model from its own weights (step 0) and yield a checkpoint at each of ``steps``.

    The loop is the one that retrains windows: an unchanged replay from any checkpoint meets the later ones.

    Args:
        task: its model holds the initial weights; it is not modified.
        optimizer: the update rule; ``batch_size`` is filled in from ``order``.
        order: the samples of every update, e.g. :class:`stagewise.retraining.schedule.BatchOrder`.
        steps: when to record; training ends at the last.
    """
    size = len(order(0))
    optimizer = replace(optimizer, batch_size=size if size < len(task.train) else 0)
    vector = ParameterVector.of(task)
    # Cloned: the caller may go on to use the model between two checkpoints.
    start = Checkpoint(0, {name: tensor.clone() for name, tensor in task.state().items()}, optimizer)
    fixed = vector.fixed(start.params)
    state = TrainingState.from_checkpoint(start, vector)
    for before, step in pairwise([0, *sorted(set(steps))]):
        state = train(task, vector, state, optimizer, [Schedule()], order, range(before, step), fixed=fixed)
        yield state.checkpoint(step, optimizer, vector, fixed)


def constant_spans(steps: range, schedules: Sequence[Schedule]) -> Iterator[range]:
    """The steps, cut where a weight changes: weights are built once per piece and not once per step."""
    changes = [change for schedule in schedules for change in schedule.changes]
    ends = {end for change in changes for end in (change.start, change.stop)}
    cuts = [steps.start, *sorted(end for end in ends if steps.start < end < steps.stop), steps.stop]
    return (range(start, stop) for start, stop in pairwise(cuts))


def _objective(task: Task, vector: ParameterVector, batch: Batch, fixed: Params) -> Callable[[Tensor, Tensor], Tensor]:
    """(1/m) sum_i beta_i l_i of one run, as a function of its parameters and its weights ``(batch,)``."""

    def objective(params: Tensor, weights: Tensor) -> Tensor:
        losses = per_sample(task.losses({**fixed, **vector.unflatten(params)}, batch))
        return (weights * losses).sum() / len(weights)

    return objective


def _gradient(
    objective: Callable[[Tensor, Tensor], Tensor], params: Tensor, weights: Tensor, batching: Batching
) -> Tensor:
    """Gradient of every run's objective, ``(runs, parameters)``."""
    if batching == "stacked" and len(params) > 1:
        gradient: Tensor = vmap(grad(objective))(params, weights)
        return gradient
    leaves = [run.detach().requires_grad_() for run in params]
    values = map(objective, leaves, weights)
    return torch.stack([torch.autograd.grad(v, p)[0] for v, p in zip(values, leaves, strict=True)])
