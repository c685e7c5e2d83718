"""Training many replays at once, exactly as the recorded run was trained.

All replays share start and batches and differ only in the weights of the samples, so that their differences are
effects of the data and not of chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import vmap

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.data import Batch
from stagewise.differentiate import differentiable
from stagewise.evaluate import Batching, Point, in_any_mode
from stagewise.retraining.schedule import LearningRate, Order, Schedule
from stagewise.retraining.start import Start, start_at
from stagewise.retraining.updates import TrainingState, update
from stagewise.stacking import BatchingChoice
from stagewise.task import Task


def train(
    start: Start,
    state: TrainingState,
    schedules: Sequence[Schedule],
    order: Order,
    steps: range,
    on_step: Callable[[int, TrainingState], None] | None = None,
    *,
    batching: BatchingChoice = "auto",
    learning_rate: LearningRate | None = None,
) -> TrainingState:
    """Make the updates ``steps`` on all replays.

    Args:
        start: the task and the update rule.
        state: where the replays stand after ``steps.start`` updates.
        schedules: the sample weights of each replay.
        order: the samples of every update, the same for all replays.
        steps: the updates to make.
        on_step: called after every update with the number of updates made and the state.
        batching: how the replays are evaluated.
        learning_rate: of the update made at ``step``; default: the run's own where known
            (``Checkpoint.coming_rates``), else the checkpoint's, held.

    Returns:
        The state after ``steps.stop`` updates.

    Raises:
        ValueError: the number of schedules is not the number of replays, or a learning rate is negative or not finite.
    """
    if len(schedules) != len(state.params):
        raise ValueError(f"expected one schedule for each of {len(state.params)} replays, got {len(schedules)}")
    task = start.task
    way = start.decided(batching, len(schedules))
    for span in constant_spans(steps, schedules):
        beta = sample_weights_of(schedules, span.start, len(task.train), state.params)
        for step in span:
            index = order(step)
            batch = task.train.batch(index, task.device)
            slope, used = gradients(start.point, state.params, batch, beta[:, index.to(beta.device)], way)
            state = update(start.rule, state, slope, step, learning_rate, used)
            if on_step is not None:
                on_step(step + 1, state)
    return state


@in_any_mode
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
    start = start_at(task, Checkpoint(0, task.state(), optimizer))
    state = start.state()
    for before, step in pairwise([0, *sorted(set(steps))]):
        state = train(start, state, [Schedule()], order, range(before, step))
        yield start.recorded(step, state, (optimizer.learning_rate,) * (step - before))


def constant_spans(steps: range, schedules: Sequence[Schedule]) -> Iterator[range]:
    """The steps, cut where a weight changes: weights are built once per piece and not once per step."""
    changes = [change for schedule in schedules for change in schedule.changes]
    ends = {end for change in changes for end in (change.start, change.stop)}
    cuts = [steps.start, *sorted(end for end in ends if steps.start < end < steps.stop), steps.stop]
    return (range(start, stop) for start, stop in pairwise(cuts))


def sample_weights_of(schedules: Sequence[Schedule], step: int, n: int, like: Tensor) -> Tensor:
    """The weights of all training samples at a step, of the device and type of ``like``.

    Returns:
        ``(schedules, n)``, or ``(schedules, n, tokens)`` where some schedule changes tokens.
    """
    weights = [schedule.weights(step, n) for schedule in schedules]
    widest = max(weights, key=lambda each: each.ndim)
    alike = [each if each.ndim == widest.ndim else each[:, None].expand_as(widest) for each in weights]
    return torch.stack(alike).to(like.dtype).to(like.device)


def gradients(point: Point, params: Tensor, batch: Batch, beta: Tensor, batching: Batching) -> tuple[Tensor, Tensor]:
    """Gradients of the objective  sum_i beta_i a_i l_i / sum_i a_i  on a batch, one for every replay.

    Args:
        point: the task.
        params: of the replays ``(replays, parameters)``.
        batch: the samples of the update.
        beta: their weights ``(replays, batch)``, or those of their tokens ``(replays, batch, tokens)``.
        batching: all replays at once, or one by one.

    Returns:
        The gradients ``(replays, parameters)``, and which parameters the objective depends on ``(replays, names)``:
        the others have a gradient of 0 here and none in torch.
    """
    if batching == "stacked" and len(params) > 1:
        return _stacked_gradients(point, params, batch, beta)
    found = [_gradient(point, row, batch, weights) for row, weights in zip(params, beta, strict=True)]
    return torch.stack([slope for slope, _ in found]), torch.stack([used for _, used in found])


def objective(point: Point, params: Mapping[str, Tensor], batch: Batch, beta: Tensor) -> Tensor:
    """What an update follows: the batch's mean loss, in which a sample, or a token, counts beta times.

    Raises:
        ValueError: weights are of tokens and losses of samples, or there are fewer weights than tokens.
    """
    losses = point.task.weighted_losses({**point.state, **params}, batch)
    shares = point.task.shares(losses)
    weighted = weights_of(losses.values, beta) * shares * losses.values
    return weighted.sum() / shares.sum().clamp(min=1e-30)


def weights_of(values: Tensor, beta: Tensor) -> Tensor:
    """Weights of samples ``(batch,)`` or tokens ``(batch, tokens)`` as they multiply the losses of a batch.

    A batch that was padded less than the longest one has the first of the tokens.

    Raises:
        ValueError: weights are of tokens and losses of samples, or there are fewer weights than tokens.
    """
    if beta.ndim == 1:
        return beta if values.ndim == 1 else beta[:, None]
    if values.ndim == 1 or values.shape[1] > beta.shape[1]:
        got = "one loss per sample" if values.ndim == 1 else f"{values.shape[1]} tokens"
        raise ValueError(f"groups are of {beta.shape[1]} tokens in a sample, but the loss returned {got}")
    return beta[:, : values.shape[1]]


def joined(point: Point, slopes: Sequence[Tensor | None], lead: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by name, None where there is none, as vectors ``(*lead, parameters)``; and which there are."""
    sizes = zip(slopes, point.vector.shapes, strict=True)
    pieces = [like.new_zeros(*lead, *shape) if slope is None else slope for slope, shape in sizes]
    flat = torch.cat([piece.reshape(*lead, -1).to(like.dtype) for piece in pieces], -1)
    return flat, torch.tensor([slope is not None for slope in slopes])


def slopes_of(value: Tensor, pieces: Mapping[str, Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """Gradient by every piece; None where the value does not depend on it."""
    if not value.requires_grad:
        return [None] * len(pieces)
    return list(torch.autograd.grad(value, list(pieces.values()), create_graph=create_graph, allow_unused=True))


def _stacked_gradients(point: Point, params: Tensor, batch: Batch, beta: Tensor) -> tuple[Tensor, Tensor]:
    # No replay depends on another: the gradient of their sum is the gradient of each.
    with differentiable(params) as leaf:
        pieces = point.vector.unflatten(leaf)
        values = vmap(lambda named, weights: objective(point, named, batch, weights))(pieces, beta)
        flat, used = joined(point, slopes_of(values.sum(), pieces), (len(params),), leaf)
    return flat.detach(), used.expand(len(params), -1)


def _gradient(point: Point, params: Tensor, batch: Batch, beta: Tensor) -> tuple[Tensor, Tensor]:
    with differentiable(params) as leaf:
        pieces = point.vector.unflatten(leaf)
        flat, used = joined(point, slopes_of(objective(point, pieces, batch, beta), pieces), (), leaf)
    return flat.detach(), used
