"""Truth for single samples: windows retrained with a random half of the samples weighing less and the other half more.

One replay says something of every sample at once, as the subsets of the linear datamodelling score do for whole runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.groups import query_groups
from stagewise.labelled import Array
from stagewise.retraining.orders import all_kinds, window_orders
from stagewise.retraining.schedule import Change, Order, Schedule
from stagewise.retraining.start import check_moves, start_at
from stagewise.retraining.window_effects import window_effects
from stagewise.stacking import BatchingChoice
from stagewise.task import Task
from stagewise.usable import at_usable, chosen_steps


def window_halves(
    task: Task,
    trajectory: Trajectory | str | Path,
    *,
    window: int,
    halves: int = 32,
    weights: tuple[float, float] = (0.5, 1.5),
    repeats: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    steps: Sequence[int] | None = None,
    max_replays: int = 64,
    batching: BatchingChoice = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Effect on every query group of giving a random half of the samples one weight and the other half another.

    From each checkpoint the run is continued for ``window`` updates, as :func:`window_ablation` continues it, once
    unchanged and once per half, all with the same batches. The halves are the same at every checkpoint. How well an
    influence of single samples orders the effects is said by :func:`window_lds`.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser and optimiser state, or their folder.
        window: number of updates.
        halves: how many random halves are drawn.
        weights: of the candidates in the half, and of the others; samples that are no candidates keep weight 1.
        repeats: number of batch orders to average over, as in :func:`window_ablation`.
        seed: of the halves and of fresh orders.
        order: the recorded run's own batch order, as in :func:`window_ablation`.
        steps: the checkpoints to start from; default all.
        max_replays: most replays trained at once.
        batching: how the replays are evaluated: ``"stacked"``, ``"loop"`` or ``"auto"``.
        progress: called with (checkpoints done, checkpoints in all) after every checkpoint.

    Returns:
        ``effect`` (step, half, query) in nats, changed minus unchanged loss; ``effect_stderr``, the standard error over
        batch orders, where there are several; ``weight`` (half, train) of every candidate, called by its index in the
        training set. Attributes ``batches`` and ``omitted``.

    Raises:
        ValueError: no checkpoint can be used, with the reasons; a step is not recorded, or there are fewer than two
            candidates.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)},
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> measured = sw.window_halves(task, sw.Trajectory.from_checkpoints([start]), window=3, halves=6)
        >>> measured.effect.shape, measured.weight[0].values.tolist().count(0.5)
        ((1, 6, 1), 2)
    """
    if window < 1 or halves < 1 or (repeats is not None and repeats < 1) or max_replays < 2:
        raise ValueError(
            "need window >= 1, halves >= 1, repeats >= 1 and max_replays >= 2, "
            f"got {window}, {halves}, {repeats} and {max_replays}"
        )
    drawn = _weights(len(task.candidates), halves, weights, seed)
    run = as_trajectory(trajectory)
    total, seen, kinds = len(chosen_steps(run, steps)), iter(range(1, len(run.steps) + 1)), list[str]()

    def measured(step: int) -> Array:
        """Effects ``(repeat, half, query)`` at a checkpoint."""
        try:
            start = start_at(task, run.load(step))
            check_moves(start)
            orders = window_orders(start, order, window, repeats, seed)
            schedules = [_schedule(task.candidates, row, range(step, step + window)) for row in drawn]
            effects = window_effects(start, schedules, orders, window, max_replays, batching)
            kinds.append(orders.kind)
        finally:
            if progress is not None:
                progress(next(seen), total)
        return effects

    found, nats = at_usable(run, steps, measured), {"units": "nats"}
    dims = ("step", "half", "query")
    variables = {
        "effect": (dims, np.stack([effects.mean(0) for effects in found.results]), nats),
        "weight": (("half", "train"), drawn),
    }
    used = min(len(effects) for effects in found.results)
    if used > 1:
        error = np.stack([effects.std(0, ddof=1) / len(effects) ** 0.5 for effects in found.results])
        variables["effect_stderr"] = (dims, error, nats | {"over": "batch orders"})
    coords = {
        "step": found.steps,
        "half": range(halves),
        "train": [str(sample) for sample in task.candidates.tolist()],
        "query": list(query_groups(task).labels),
    }
    attrs = {"estimator": "window halves", "window": window, "repeats": used, "batches": all_kinds(kinds)}
    return xr.Dataset(variables, coords, attrs | found.attrs)


def _weights(count: int, halves: int, weights: tuple[float, float], seed: int) -> Array:
    """The first weight for a random half of ``count`` samples, the second for the others: ``(half, sample)``."""
    if count < 2:
        raise ValueError(f"a half needs two candidates or more, got {count}")
    generator, drawn = np.random.default_rng(seed), np.full((halves, count), float(weights[1]))
    for row in drawn:
        row[generator.permutation(count)[: count // 2]] = weights[0]
    return drawn


def _schedule(samples: torch.Tensor, weights: Array, span: range) -> Schedule:
    """``samples`` have these weights during the updates of ``span``."""
    chosen = [(weight, samples[torch.from_numpy(weights == weight)]) for weight in np.unique(weights).tolist()]
    return Schedule(tuple(Change(span.start, span.stop, rows, weight) for weight, rows in chosen))
