"""Retraining whole runs on changed data: what would the queries have lost, had the data been different?

A sample left out of the whole run changes every later update too, so this is the effect of the data on the
run, where a window ablation is the effect of the data at a moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import check_fits
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.retraining.labelled import effect_dataset
from stagewise.retraining.runs import Progress, check_order, check_steps, losses_along, paired_losses
from stagewise.retraining.schedule import LearningRate, Order, Schedule
from stagewise.retraining.training import Batching
from stagewise.task import Task


def retrain(
    task: Task,
    start: Checkpoint,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    learning_rate: LearningRate | None = None,
    max_runs: int = 256,
    batching: Batching = "stacked",
    progress: Progress | None = None,
) -> xr.DataArray:
    """Mean loss of every query group along runs that see the data as the schedules say.

    All runs start at the same weights, make the checkpoint's own updates and share their batches. A checkpoint
    knows only the learning rate of the update that follows it, which is held for all updates: if the run's own
    rate changed, pass ``learning_rate``, or these are other runs.

    Args:
        task: the model, its losses and data.
        start: where the runs start, with optimiser and optimiser state; at step 0 the state is empty.
        schedules: the sample weights of each run, e.g. ``Schedule.whole_run`` or ``Schedule.window``.
        order: the samples of every update.
        steps: when to look, ascending from ``start.step`` on; training ends at the last.
        learning_rate: of the update made at ``step``; default: the checkpoint's, held.
        max_runs: most runs trained at once.
        batching: how the runs are evaluated, ``"stacked"`` or ``"loop"``.
        progress: called with (runs done, runs in all) after every stack.

    Returns:
        Losses in nats ``(step, run, query)``; ``run`` counts the schedules.

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
        parts.append(losses_along(task, start, stack, order, chosen, batching=batching, learning_rate=learning_rate))
        if progress is not None:
            progress(first + len(stack), len(schedules))
    coords = {"step": chosen, "run": range(len(schedules)), "query": list(query_groups(task).labels)}
    losses = torch.cat(parts, 1).double().cpu().numpy()
    return xr.DataArray(losses, coords, ("step", "run", "query"), "loss", {"unit": "nats"})


def leave_out(
    task: Task,
    start: Checkpoint,
    order: Order,
    steps: Sequence[int],
    *,
    weight: float = 0.0,
    groups: Labels | None = None,
    learning_rate: LearningRate | None = None,
    max_runs: int = 256,
    batching: Batching = "stacked",
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect on every query group of changing the weight of every train group during the whole run.

        effect[i, j] = mean loss of query group j, group i changed  -  the same, unchanged.

    All runs make the checkpoint's own updates. Its learning rate is held, as :func:`retrain` explains: if the
    run's own rate changed, pass ``learning_rate``.

    Args:
        task: the model, its losses and data.
        start: where the runs start, with optimiser and optimiser state; at step 0 the state is empty.
        order: the samples of every update, the same for all runs.
        steps: when to look, ascending from ``start.step`` on.
        weight: of the changed group's samples from ``start`` on; 0 leaves them out. Not 1, which is no change.
        groups: label of every training sample; default ``task.train_groups``, or every sample alone in a set
            of at most 64.
        learning_rate: of the update made at ``step``; default: the checkpoint's, held.
        max_runs: most runs trained at once.
        batching: how the runs are evaluated, ``"stacked"`` or ``"loop"``.
        progress: called with (groups done, groups in all) after every stack of runs.

    Returns:
        ``effect`` (step, train, query) in nats, positive = the group was helpful if ``weight`` < 1;
        ``loss`` (step, query) of the unchanged run, in nats; coordinate ``train_size`` (train).

    Raises:
        ValueError: the weight is 1, there are no groups, the steps cannot be reached, the order does not fit the
            data or the checkpoint, or the checkpoint lacks what its optimizer needs.
        CheckpointError: the checkpoint is of another model.
    """
    if max_runs < 2:
        raise ValueError(f"need max_runs >= 2, a changed run and the unchanged one, got {max_runs}")
    if weight == 1:
        raise ValueError("weight is 1, with which nothing is changed; use another, e.g. 0 to leave each group out")
    check_fits(task, start)
    check_order(task, start, order)
    chosen, trained = check_steps(start, steps), train_groups(task, groups)
    schedules = [Schedule.whole_run(index, weight) for index in trained.indices]
    effect, loss = paired_losses(
        task,
        start,
        schedules,
        order,
        chosen,
        max_runs=max_runs,
        batching=batching,
        learning_rate=learning_rate,
        progress=progress,
    )
    attrs = {"estimator": "leave-out retraining"}
    measured = effect.double().cpu().numpy()
    dataset = effect_dataset(measured, None, chosen, trained, query_groups(task), weight, attrs)
    return dataset.assign(loss=(("step", "query"), loss.double().cpu().numpy(), {"unit": "nats"}))
