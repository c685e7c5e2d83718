"""Window ablation: what a change of the data during a window of training does to the queries, by retraining.

This is the ground truth for influence at a checkpoint. Leaving data out of the whole run is not: its effect
is carried through all later training, while the influence at a checkpoint belongs to that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.labelled import Array, effect_dataset
from stagewise.retraining.orders import all_kinds, window_orders
from stagewise.retraining.schedule import Order, Schedule
from stagewise.retraining.start import check_moves, start_at
from stagewise.retraining.window_effects import window_effects
from stagewise.stacking import BatchingChoice
from stagewise.task import Task
from stagewise.usable import at_usable, chosen_steps


def window_ablation(
    task: Task,
    trajectory: Trajectory | str | Path,
    *,
    window: int,
    weight: float = 0.8,
    groups: Labels | None = None,
    steps: Sequence[int] | None = None,
    repeats: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    max_replays: int = 64,
    batching: BatchingChoice = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Effect on every query group of changing the weight of every train group during a window of training.

    From each checkpoint the run is continued for ``window`` updates with its own optimiser, once unchanged and
    once per group with the losses of that group's samples weighted by ``weight``. All replays share their
    batches. Learning rates are the run's own where later checkpoints have recorded them, else the checkpoint's, held:
    as in the posterior that predicts the effect. At the window's end

        effect[i, j] = mean loss of query group j, group i changed  -  the same, unchanged.

    A sample's effect on itself is in it, where the queries hold training samples.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser and optimiser state, or their folder.
        window: number of updates. Only if the window is shorter than a stage of training can a single
            checkpoint predict its effect.
        weight: of the changed group's samples; 0 leaves them out, 0.8 is nearly a derivative.
        groups: label of every training sample, or of every token ``(samples, tokens)``; default ``task.train_groups``,
            or every candidate alone if there are at most 64.
        steps: the checkpoints to start from; default all.
        repeats: number of batch orders to average over, one where the batch is the whole set; default the run's own
            alone where it is known, else four.
        seed: of the fresh ones.
        order: the recorded run's own batch order, used as the first. By default that of the batches which later
            checkpoints have recorded (``Checkpoint.coming_batches``), where they cover the window; else all orders are
            fresh.
        max_replays: most replays trained at once.
        batching: how the replays are evaluated: ``"stacked"`` in one ``vmap``, ``"loop"``: one by one, ``"auto"``:
            stacked if the model allows it.
        progress: called with (checkpoints done, checkpoints in all) after every checkpoint.

    Returns:
        ``effect`` (step, train, query) in nats, positive = the group was helpful if ``weight`` < 1;
        ``effect_stderr``, the standard error over batch orders, where there are several; coordinates
        ``train_size`` and ``query_size``, the numbers of samples in the groups. Attribute ``batches``: "recorded"
        (the run's own), "recorded and fresh", "fresh", "given" or "whole training set"; ``omitted``: the checkpoints
        that could not be used, with reasons (JSON): a learning rate of 0, no optimizer or moments, another model, a
        batch size that the order does not have.

    Raises:
        ValueError: no checkpoint can be used, with the reasons; a step is not recorded, or there are no groups.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> measured = sw.window_ablation(task, sw.Trajectory.from_checkpoints([start]), window=3)
        >>> measured.effect.dims, measured.effect.shape
        (('step', 'train', 'query'), (1, 2, 1))
    """
    if window < 1 or (repeats is not None and repeats < 1) or max_replays < 2:
        raise ValueError(
            f"need window >= 1, repeats >= 1 and max_replays >= 2, got {window}, {repeats} and {max_replays}"
        )
    run, trained = as_trajectory(trajectory), train_groups(task, groups)
    total, seen = len(chosen_steps(run, steps)), iter(range(1, len(run.steps) + 1))
    kinds: list[str] = []

    def measured(step: int) -> Array:
        """Effects ``(repeat, train, query)`` at a checkpoint."""
        try:
            start = start_at(task, run.load(step))
            check_moves(start)
            orders = window_orders(start, order, window, repeats, seed)
            schedules = [Schedule.window(index, step, window, weight, trained.tokens) for index in trained.indices]
            effects = window_effects(start, schedules, orders, window, max_replays, batching)
            kinds.append(orders.kind)
        finally:
            if progress is not None:
                progress(next(seen), total)
        return effects

    found = at_usable(run, steps, measured)
    used = min(len(effects) for effects in found.results)
    error = None
    if used > 1:
        error = np.stack([effects.std(0, ddof=1) / len(effects) ** 0.5 for effects in found.results])
    mean = np.stack([effects.mean(0) for effects in found.results])
    attrs = {"estimator": "window ablation", "window": window, "repeats": used, "batches": all_kinds(kinds)}
    attrs |= found.attrs
    return effect_dataset(mean, error, found.steps, trained, query_groups(task), weight, attrs)
