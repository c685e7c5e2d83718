"""Window ablation: what a change of the data during a window of training does to the queries, by retraining.

This is the ground truth for influence at a checkpoint. Leaving data out of the whole run is not: its effect
is carried through all later training, while the influence at a checkpoint belongs to that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory, check_fits
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.retraining.labelled import effect_dataset
from stagewise.retraining.runs import check_order, paired_losses
from stagewise.retraining.schedule import BatchOrder, Order, Schedule
from stagewise.retraining.training import Batching
from stagewise.retraining.updates import recorded_optimizer
from stagewise.task import Task


def window_ablation(
    task: Task,
    trajectory: Trajectory,
    *,
    window: int,
    weight: float = 0.8,
    groups: Labels | None = None,
    steps: Sequence[int] | None = None,
    orders: int = 1,
    seed: int = 0,
    order: Order | None = None,
    max_runs: int = 64,
    batching: Batching = "stacked",
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Effect on every query group of changing the weight of every train group during a window of training.

    From each checkpoint the run is continued for ``window`` updates with its own optimiser, once unchanged and
    once per group with the losses of that group's samples weighted by ``weight``. All continuations share their
    batches. The learning rate is the checkpoint's, held for the whole window as by the posterior that predicts
    it, also where the run's own rate changed. At the window's end

        effect[i, j] = mean loss of query group j, group i changed  -  the same, unchanged.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser and optimiser state.
        window: number of updates. Only if the window is shorter than a stage of training can a single
            checkpoint predict its effect.
        weight: of the changed group's samples; 0 leaves them out, 0.8 is nearly a derivative.
        groups: label of every training sample; default ``task.train_groups``, or every sample alone in a set
            of at most 64.
        steps: the checkpoints to start from; default all.
        orders: number of independent batch orders to average over; one where the batch is the whole set.
        seed: of the batch orders.
        order: the recorded run's own batch order, used as the first. By default all orders are fresh.
        max_runs: most runs trained at once.
        batching: how the runs are evaluated, ``"stacked"`` or ``"loop"``.
        progress: called with (checkpoints done, checkpoints in all) after every checkpoint.

    Returns:
        ``effect`` (step, train, query) in nats, positive = the group was helpful if ``weight`` < 1;
        ``effect_stderr``, the standard error over batch orders, where there are several; coordinate
        ``train_size`` (train), the number of samples in the group.

    Raises:
        ValueError: a checkpoint lacks what its optimiser needs, a step is not recorded, there are no groups, or
            the order does not fit the data or a checkpoint.
        CheckpointError: a checkpoint is of another model.
    """
    if window < 1 or orders < 1 or max_runs < 2:
        raise ValueError(f"need window >= 1, orders >= 1 and max_runs >= 2, got {window}, {orders} and {max_runs}")
    chosen = trajectory.steps if steps is None else tuple(steps)
    unknown = sorted(set(chosen) - set(trajectory.steps))
    if unknown or not chosen:
        raise ValueError(f"steps {unknown} are not recorded; the trajectory has {list(trajectory.steps)}")
    trained = train_groups(task, groups)
    effects = []
    for done, step in enumerate(chosen, start=1):
        checkpoint = trajectory.load(step)
        check_fits(task, checkpoint)
        if order is not None:
            check_order(task, checkpoint, order)
        schedules = [Schedule.window(index, step, window, weight) for index in trained.indices]
        repeats = []
        for batches in _orders(task, checkpoint, order, orders, seed):
            end = [step + window]
            effect, _ = paired_losses(task, checkpoint, schedules, batches, end, max_runs=max_runs, batching=batching)
            repeats.append(effect[0])
        effects.append(torch.stack(repeats).double().cpu().numpy())
        if progress is not None:
            progress(done, len(chosen))
    used = min(len(repeats) for repeats in effects)
    error = np.stack([repeats.std(0, ddof=1) / len(repeats) ** 0.5 for repeats in effects]) if used > 1 else None
    mean = np.stack([repeats.mean(0) for repeats in effects])
    attrs = {"estimator": "window ablation", "window": window, "orders": used}
    return effect_dataset(mean, error, chosen, trained, query_groups(task), weight, attrs)


def _orders(task: Task, checkpoint: Checkpoint, first: Order | None, count: int, seed: int) -> list[Order]:
    """``count`` independent batch orders, or the only one there is if the batch is the whole training set."""
    n = len(task.train)
    batch_size = recorded_optimizer(checkpoint).batch_size if first is None else len(first(checkpoint.step))
    if batch_size is None:
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} does not say how many samples its updates used; pass "
            "order=BatchOrder(n, batch_size), or record the optimizer with its batch_size (0 = all samples)"
        )
    if batch_size == 0 or batch_size >= n:
        return [first or BatchOrder(n)]
    # Seeds are hashed so that a fresh order is not by accident the one the run was recorded with.
    seeds = np.random.SeedSequence(seed).generate_state(count)
    fresh: list[Order] = [BatchOrder(n, batch_size, int(state)) for state in seeds]
    return fresh if first is None else [first, *fresh[1:]]
