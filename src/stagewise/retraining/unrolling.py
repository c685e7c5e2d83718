"""Exact unrolling: the derivative of a training run with respect to the weights of its samples.

The run is repeated and differentiated update by update, with its own optimiser, batches and order. It is the run
as it was made if its learning rates are too: those that later checkpoints of the trajectory have recorded, or that
``learning_rate`` gives; else the checkpoint's is held. For SGD the derivative r of the weights in a
direction of sample weights d obeys

    r_{s+1} = (I - eta_s H_s) r_s  -  eta_s sum_{i in B_s} d_i(s) a_i grad l_i(w_s) / sum_{i in B_s} a_i,

with r_start = 0 and a_i the sample's weight in the objective, and a query's loss changes by grad l_q(w_t) . r_t.
Momentum and Adam carry derivatives of their moments along, and clipping that of the gradient's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import xarray as xr
from torch import Tensor

from stagewise.attention import plain_attention
from stagewise.checkpoint import Checkpoint
from stagewise.data import Batch
from stagewise.derivatives import directional_derivatives
from stagewise.differentiate import differentiable, pull
from stagewise.during import check_during, during_attrs
from stagewise.evaluate import Point, in_any_mode
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.labelled import influence_dataset
from stagewise.retraining.losses import Progress
from stagewise.retraining.schedule import LearningRate, Order, Schedule
from stagewise.retraining.start import Start, check_moves, check_order, check_steps, start_at
from stagewise.retraining.training import constant_spans, joined, sample_weights_of, slopes_of, weights_of
from stagewise.retraining.updates import Rule, TrainingState, update
from stagewise.task import Task
from stagewise.twice import second_derivatives


@in_any_mode
def unroll(
    task: Task,
    start: Checkpoint,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    learning_rate: LearningRate | None = None,
    max_replays: int = 256,
    progress: Progress | None = None,
) -> xr.DataArray:
    """First-order effect of each schedule on every query group's loss, through the whole run.

    The derivative at epsilon = 0 of the losses of a run with the sample weights 1 + epsilon (beta(t) - 1),
    beta the schedule's: what :func:`stagewise.retraining.leave_out.retrain` measures, if the change were
    infinitely small. It is exact up to rounding wherever the losses are twice differentiable. Learning
    rates are those that are explained there.

    Args:
        task: the model, its losses and data.
        start: where the replay starts, with optimiser and optimiser state; at step 0 the state is empty.
        schedules: one direction of change each.
        order: the samples of every update.
        steps: when to look, ascending from ``start.step`` on; the replay ends at the last.
        learning_rate: of the update made at ``step``; default: the run's own where known
            (``Checkpoint.coming_rates``), else the checkpoint's, held.
        max_replays: most directions carried along one replay; bounds the memory.
        progress: called with (directions done, directions in all) after every pass.

    Returns:
        Derivatives in nats per unit epsilon ``(step, replay, query)``; ``replay`` counts the schedules. The
        first-order prediction of ``retrain``'s loss with the schedule minus that without.

    Raises:
        ValueError: there are no schedules, the steps cannot be reached, the order does not fit the data or the
            checkpoint, the checkpoint lacks what its optimizer needs, its learning rate is 0 and held, or something is
            hidden from second derivatives.
        CheckpointError: the checkpoint is of another model.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)},
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> sw.unroll(task, start, [sw.Schedule.window([0], 2, 3, weight=0.0)], sw.BatchOrder(4), [2, 5]).shape
        (2, 1, 1)
    """
    if not schedules or max_replays < 1:
        raise ValueError(f"need one schedule or more and max_replays >= 1, got {len(schedules)} and {max_replays}")
    chosen, origin = check_steps(start, steps), start_at(task, start, curvature=True)
    check_moves(origin, learning_rate)
    check_order(origin, order)
    parts = []
    for first in range(0, len(schedules), max_replays):
        stack = schedules[first : first + max_replays]
        parts.append(derivatives_along(origin, stack, order, chosen, learning_rate))
        if progress is not None:
            progress(first + len(stack), len(schedules))
    coords = {"step": chosen, "replay": range(len(schedules)), "query": list(query_groups(task).labels)}
    derivatives = torch.cat(parts, 1).numpy()
    return xr.DataArray(derivatives, coords, ("step", "replay", "query"), "derivative", {"units": "nats"})


def unrolled_influence(
    task: Task,
    start: Checkpoint,
    order: Order,
    steps: Sequence[int],
    *,
    during: range | None = None,
    groups: Labels | None = None,
    learning_rate: LearningRate | None = None,
    max_replays: int = 256,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Exact influence of every train group on every query group: the run's derivative by sample weight.

        value[i, j] = d (mean loss of query group j) / d (weight of group i) / (samples in group i)

    A sample's influence on itself is in it. Learning rates are those that
    :func:`stagewise.retraining.leave_out.retrain` explains.

    Args:
        task: the model, its losses and data.
        start: where the replay starts, with optimiser and optimiser state; at step 0 the state is empty.
        order: the samples of every update.
        steps: when to look, ascending from ``start.step`` on.
        during: the updates whose weights are varied, e.g. ``range(100, 150)``; default the whole run.
        groups: label of every training sample, or of every token ``(samples, tokens)``; default ``task.train_groups``,
            or every candidate alone if there are at most 64.
        learning_rate: of the update made at ``step``; default: the run's own where known
            (``Checkpoint.coming_rates``), else the checkpoint's, held.
        max_replays: most groups carried along one replay; bounds the memory.
        progress: called with (groups done, groups in all) after every pass.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight of one sample. Negative
        is helpful.

    Raises:
        ValueError: as :func:`unroll`, there are no groups, or ``during`` is empty, has gaps or holds none of the
            updates from ``start.step`` to the last of ``steps``.
        CheckpointError: the checkpoint is of another model.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> sw.unrolled_influence(task, start, sw.BatchOrder(4), [10], during=range(5, 10)).value.shape
        (1, 2, 1)
    """
    chosen, trained = check_steps(start, steps), train_groups(task, groups)
    varied = check_during(during, [start.step, *chosen])
    # Weight 2 is the direction in which a weight grows from 1 at unit rate.
    schedules = [Schedule.window(index, varied.start, len(varied), 2.0, trained.tokens) for index in trained.indices]
    derivatives = unroll(
        task, start, schedules, order, chosen, learning_rate=learning_rate, max_replays=max_replays, progress=progress
    )
    sizes = torch.tensor(trained.sizes).numpy()[:, None]
    attrs = {"estimator": "unrolling", **during_attrs(during)}
    return influence_dataset(derivatives.values / sizes, None, chosen, trained, query_groups(task), attrs)


def derivatives_along(
    start: Start, schedules: Sequence[Schedule], order: Order, steps: Sequence[int], learning_rate: LearningRate | None
) -> Tensor:
    """One replay with all its tangents: ``(step, schedule, query)``, float64, on the CPU."""
    task, point = start.task, start.point
    # The replay is repeated for each tangent: updates act on every row alone, so that each moves along its own.
    state = start.state(len(schedules))
    zero = torch.zeros_like(state.params)
    tangent = TrainingState(zero, zero, zero, state.counts)
    derivatives = []
    for before, step in pairwise([start.step, *steps]):
        for span in constant_spans(range(before, step), schedules):
            directions = sample_weights_of(schedules, span.start, len(task.train), state.params) - 1
            for now in span:
                index = order(now)
                batch = task.train.batch(index, task.device)
                along = directions[:, index.to(directions.device)]
                slope, change, used = _gradients(point, state.params[0], batch, tangent.params, along)
                state, tangent = _update(start.rule, state, tangent, slope, change, now, learning_rate, used)
        derivatives.append(_query_derivatives(point, state.params[0], tangent.params))
    return torch.stack(derivatives)


def _gradients(
    point: Point, params: Tensor, batch: Batch, tangents: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The replay's gradient ``(parameters,)``, its derivative along every tangent, and which parameters have one.

    The derivative ``(tangent, parameters)`` is  H r + sum_i d_i a_i grad l_i / sum_i a_i.  Both terms are products with
    a transposed Jacobian (H is symmetric) of the same two outputs, so one graph of the model serves them all.
    """
    with plain_attention(), differentiable(params) as leaf:
        pieces = point.vector.unflatten(leaf)
        losses = point.task.weighted_losses({**point.state, **pieces}, batch)
        values, shares = losses.values, point.task.shares(losses)
        shares = shares / shares.sum().clamp(min=1e-30)
        found = slopes_of((shares * values).sum(), pieces, create_graph=True)
        slope, used = joined(point, found, (), leaf)
        along = torch.stack([weights_of(values, row) * shares for row in directions]).to(values)
        with second_derivatives("unrolling", "tracin and retraining do without"):
            change = pull([slope, values], [leaf], [tangents, along])[0]
    return slope.detach(), change.detach(), used


def _query_derivatives(point: Point, params: Tensor, tangents: Tensor) -> Tensor:
    """Derivative of every query group's mean loss along every tangent: ``(tangent, query)``, float64, on the CPU."""
    along, weights, queried = {}, {}, query_groups(point.task)
    for name, data in point.task.queries.items():
        tokens = queried.widths.get(name, 0)
        along[name], weights[name] = directional_derivatives(point, params, tangents, data, name, tokens)
    return queried.mean(along, weights)


def _update(
    rule: Rule,
    state: TrainingState,
    tangent: TrainingState,
    gradient: Tensor,
    change: Tensor,
    step: int,
    learning_rate: LearningRate | None,
    used: Tensor,
) -> tuple[TrainingState, TrainingState]:
    """One update of the replay and of its tangents."""
    used = used.expand(len(change), -1)

    primals = (state.params, state.first_moment, state.second_moment, gradient.expand_as(change))
    tangents = (tangent.params, tangent.first_moment, tangent.second_moment, change)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [primal.detach().clone().requires_grad_() for primal in primals]
        params, first, second, slope = leaves
        after = update(rule, TrainingState(params, first, second, state.counts), slope, step, learning_rate, used)
        outputs = [after.params, after.first_moment, after.second_moment]
        # No row depends on another: one product with the Jacobian moves each row along its own tangent.
        along = _pushed(outputs, leaves, tangents)
    here = [output.detach() for output in outputs]
    return TrainingState(here[0], here[1], here[2], after.counts), TrainingState(
        along[0], along[1], along[2], after.counts
    )


def _pushed(outputs: Sequence[Tensor], leaves: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """Jacobian times tangents, by reverse mode twice, as :func:`stagewise.differentiate.push` does it."""
    probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    linear = torch.autograd.grad(outputs, leaves, probes, create_graph=True, materialize_grads=True, allow_unused=True)
    live = [(image, tangent) for image, tangent in zip(linear, tangents, strict=True) if image.requires_grad]
    images, sides = zip(*live, strict=True)
    return list(torch.autograd.grad(images, probes, sides, materialize_grads=True, allow_unused=True))
