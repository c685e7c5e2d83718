"""Exact unrolling: the derivative of a training run with respect to the weights of its samples.

The run is repeated and differentiated update by update, with its own optimiser, batches and order. It is the run
as it was made if its learning rates are too: a checkpoint knows only the rate of the update that follows it, which
is held for all updates unless ``learning_rate`` gives that of each. For SGD the derivative r of the weights in a
direction of sample weights d obeys

    r_{s+1} = (I - eta_s H_s) r_s  -  eta_s (1/m) sum_{i in B_s} d_i(s) grad l_i(w_s),       r_start = 0,

and a query's loss changes by grad l_q(w_t) . r_t. Momentum and Adam carry derivatives of their moments along.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import xarray as xr
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from stagewise.attention import plain_attention
from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import check_fits
from stagewise.groups import Labels, per_sample, query_groups, train_groups
from stagewise.retraining.labelled import influence_dataset
from stagewise.retraining.runs import Progress, check_order, check_steps, fixed_tensors, query_losses
from stagewise.retraining.schedule import LearningRate, Order, Schedule, check_window
from stagewise.retraining.training import constant_spans
from stagewise.retraining.updates import TrainingState, recorded_optimizer, update
from stagewise.task import Batch, Params, Task
from stagewise.vector import ParameterVector


def unroll(
    task: Task,
    start: Checkpoint,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    learning_rate: LearningRate | None = None,
    max_runs: int = 256,
    progress: Progress | None = None,
) -> xr.DataArray:
    """First-order effect of each schedule on every query group's loss, through the whole run.

    The derivative at epsilon = 0 of the losses of a run with the sample weights 1 + epsilon (beta(t) - 1),
    beta the schedule's: what :func:`stagewise.retraining.leave_out.retrain` measures, if the change were
    infinitely small. It is exact up to rounding wherever the losses are twice differentiable. As there, the
    checkpoint's learning rate is held: if the run's own rate changed, pass ``learning_rate``, or it is another run
    that is differentiated.

    Args:
        task: the model, its losses and data.
        start: where the run starts, with optimiser and optimiser state; at step 0 the state is empty.
        schedules: one direction of change each.
        order: the samples of every update.
        steps: when to look, ascending from ``start.step`` on; the run ends at the last.
        learning_rate: of the update made at ``step``; default: the checkpoint's, held.
        max_runs: most directions carried along one pass over the run; bounds the memory.
        progress: called with (directions done, directions in all) after every pass.

    Returns:
        Derivatives in nats per unit epsilon ``(step, run, query)``; ``run`` counts the schedules. The
        first-order prediction of ``retrain``'s loss with the schedule minus that without.

    Raises:
        ValueError: there are no schedules, the steps cannot be reached, the order does not fit the data or the
            checkpoint, or the checkpoint lacks what its optimizer needs.
        CheckpointError: the checkpoint is of another model.
    """
    if not schedules or max_runs < 1:
        raise ValueError(f"need one schedule or more and max_runs >= 1, got {len(schedules)} and {max_runs}")
    check_fits(task, start)
    check_order(task, start, order)
    chosen, parts = check_steps(start, steps), []
    for first in range(0, len(schedules), max_runs):
        stack = schedules[first : first + max_runs]
        parts.append(_derivatives_along(task, start, stack, order, chosen, learning_rate))
        if progress is not None:
            progress(first + len(stack), len(schedules))
    coords = {"step": chosen, "run": range(len(schedules)), "query": list(query_groups(task).labels)}
    derivatives = torch.cat(parts, 1).double().cpu().numpy()
    return xr.DataArray(derivatives, coords, ("step", "run", "query"), "derivative", {"unit": "nats"})


def unrolled_influence(
    task: Task,
    start: Checkpoint,
    order: Order,
    steps: Sequence[int],
    *,
    window: range | None = None,
    groups: Labels | None = None,
    learning_rate: LearningRate | None = None,
    max_runs: int = 256,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Exact influence of every train group on every query group: the run's derivative by sample weight.

        value[i, j] = d (mean loss of query group j) / d (weight of group i) / (samples in group i)

    The checkpoint's learning rate is held, as :func:`unroll` explains: if the run's own rate changed, pass
    ``learning_rate``.

    Args:
        task: the model, its losses and data.
        start: where the run starts, with optimiser and optimiser state; at step 0 the state is empty.
        order: the samples of every update.
        steps: when to look, ascending from ``start.step`` on.
        window: the updates whose weights are varied, e.g. ``range(100, 150)``; default the whole run.
        groups: label of every training sample; default ``task.train_groups``, or every sample alone in a set
            of at most 64.
        learning_rate: of the update made at ``step``; default: the checkpoint's, held.
        max_runs: most groups carried along one pass over the run; bounds the memory.
        progress: called with (groups done, groups in all) after every pass.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight of one sample. Negative
        is helpful.

    Raises:
        ValueError: as :func:`unroll`, there are no groups, or the window is empty, has gaps or holds none of the
            updates from ``start.step`` to the last of ``steps``.
        CheckpointError: the checkpoint is of another model.
    """
    chosen, trained = check_steps(start, steps), train_groups(task, groups)
    varied = check_window(window, [start.step, *chosen])
    # Weight 2 is the direction in which a weight grows from 1 at unit rate.
    schedules = [Schedule.window(index, varied.start, len(varied), 2.0) for index in trained.indices]
    derivatives = unroll(
        task, start, schedules, order, chosen, learning_rate=learning_rate, max_runs=max_runs, progress=progress
    )
    sizes = torch.tensor(trained.sizes).numpy()[:, None]
    attrs = {"estimator": "unrolling"} | ({"window": [window.start, window.stop]} if window else {})
    return influence_dataset(derivatives.values / sizes, chosen, trained, query_groups(task), attrs)


def _derivatives_along(
    task: Task,
    start: Checkpoint,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    learning_rate: LearningRate | None,
) -> Tensor:
    """One pass over the run with all its tangents: ``(step, run, query)``."""
    vector, queried, optimizer = ParameterVector.of(task), query_groups(task), recorded_optimizer(start)
    fixed = fixed_tensors(task, vector, start)
    # The run is repeated for each tangent: updates and losses act on every row alone, so that one forward-mode
    # pass differentiates each row along its own tangent.
    state = TrainingState.from_checkpoint(start, vector, len(schedules), task.device)
    zero = torch.zeros_like(state.params)
    tangent = TrainingState(zero, zero, zero)

    def losses(params: Tensor) -> Tensor:
        return query_losses(task, vector, params, fixed, queried)

    derivatives = []
    for before, step in pairwise([start.step, *steps]):
        for span in constant_spans(range(before, step), schedules):
            directions = torch.stack([s.weights(span.start, len(task.train)) for s in schedules]) - 1
            directions = directions.to(state.params)
            for now in span:
                index = order(now)
                batch = task.train.batch(index, task.device)
                along = directions[:, index.to(directions.device)]
                gradients = _gradients(task, vector, state.params[0], fixed, batch, tangent.params, along)
                state, tangent = _update(optimizer, state, tangent, *gradients, now, learning_rate)
        with plain_attention():
            derivatives.append(jvp(losses, (state.params,), (tangent.params,))[1])
    return torch.stack(derivatives)


def _gradients(
    task: Task,
    vector: ParameterVector,
    params: Tensor,
    fixed: Params,
    batch: Batch,
    tangents: Tensor,
    directions: Tensor,
) -> tuple[Tensor, Tensor]:
    """The run's gradient ``(parameters,)`` and its derivative along every tangent ``(tangent, parameters)``.

    The derivative is H r + (1/m) sum_i d_i grad l_i. Both terms are products with a transposed Jacobian (H is
    symmetric) of the same two outputs, so one graph of the model serves them all.
    """

    def mean_and_losses(params: Tensor) -> tuple[Tensor, Tensor]:
        losses = per_sample(task.losses({**fixed, **vector.unflatten(params)}, batch))
        return losses.mean(), losses

    def gradient_and_losses(params: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = grad(mean_and_losses, has_aux=True)(params)
        return both

    with plain_attention():
        outputs, pull = vjp(gradient_and_losses, params)[:2]
        derivative: Tensor = vmap(lambda r, d: pull((r, d))[0])(tangents, directions / directions.shape[1])
    return outputs[0], derivative


def _update(
    optimizer: Optimizer,
    state: TrainingState,
    tangent: TrainingState,
    gradient: Tensor,
    change: Tensor,
    step: int,
    learning_rate: LearningRate | None,
) -> tuple[TrainingState, TrainingState]:
    """One update of the run and of its tangents."""

    def updated(*parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        after = update(optimizer, TrainingState(*parts[:3]), parts[3], step, learning_rate)
        return after.params, after.first_moment, after.second_moment

    primals = (state.params, state.first_moment, state.second_moment, gradient.expand_as(change).contiguous())
    tangents = (tangent.params, tangent.first_moment, tangent.second_moment, change)
    after, moved = jvp(updated, primals, tangents)[:2]
    return TrainingState(*after), TrainingState(*moved)
