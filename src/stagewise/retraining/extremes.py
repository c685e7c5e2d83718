"""Proof beyond groups: re-weight the samples that an estimate picks, and as many like them that it does not pick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.evaluate import chunks
from stagewise.groups import query_groups
from stagewise.labelled import Array
from stagewise.retraining.orders import all_kinds, window_orders
from stagewise.retraining.schedule import Order, Schedule
from stagewise.retraining.start import Start, check_moves, start_at
from stagewise.retraining.window_effects import window_effects
from stagewise.stacking import BatchingChoice
from stagewise.task import Task
from stagewise.usable import at_usable

SIDES = ("helpful", "harmful")
_NEAREST = 8  # samples of like loss, of which a random one is drawn

Indices = NDArray[np.intp]


def extremes_ablation(
    task: Task,
    trajectory: Trajectory | str | Path,
    influence: xr.Dataset,
    *,
    window: int,
    count: int,
    weight: float = 0.0,
    draws: int = 8,
    repeats: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    max_replays: int = 64,
    batching: BatchingChoice = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Retrain windows without the samples that an estimate calls most helpful or most harmful to each query.

    Beside them stand random samples, one for each that was picked: of the same train group, and of like loss at the
    checkpoint. An estimate that only knows which samples are hard, or of which class they are, does no better.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser and optimiser state, or their folder.
        influence: ``value`` (step, train, query) of single samples, e.g. ``window_influence(..., per="sample")``: train
            labels are their indices, query labels those of the task's query groups.
        window: number of updates.
        count: how many samples are picked on either side.
        weight: of the samples during the window; 0 leaves them out.
        draws: how many random sets stand beside each that was picked; two or more.
        repeats: number of batch orders to average over, as in ``window_ablation``.
        seed: of the random samples and of fresh orders.
        order: the recorded run's own batch order, as in ``window_ablation``.
        max_replays: most replays trained at once.
        batching: how the replays are evaluated: ``"stacked"``, ``"loop"`` or ``"auto"``.
        progress: called with (checkpoints done, checkpoints in all) after every checkpoint.

    Returns:
        Along (step, side, query), in nats: ``effect``, changed minus unchanged loss; ``predicted`` to first order;
        ``random`` (with ``draw``), the effects of the random sets; ``difference``, effect minus mean random effect, and
        ``difference_stderr``, the spread of single random sets and of their mean. Attributes ``batches`` and
        ``omitted``.

    Raises:
        ValueError: the labels are not those of single samples and of the task's queries, there are not enough samples
            to pick from, or no checkpoint can be used, with the reasons.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(8), torch.arange(8.0) % 2
        >>> task = sw.Task(
        ...     torch.nn.Linear(8, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)},
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> run = sw.Trajectory.from_checkpoints([start])
        >>> exact = sw.window_influence(task, run, window=3, per="sample")
        >>> proof = sw.extremes_ablation(task, run, exact, window=3, count=2, draws=4)
        >>> proof.effect.dims, proof.random.sizes["draw"]
        (('step', 'side', 'query'), 4)
    """
    if window < 1 or count < 1 or draws < 2:
        raise ValueError(f"need window >= 1, count >= 1 and draws >= 2, got {window}, {count} and {draws}")
    run, queried = as_trajectory(trajectory), query_groups(task)
    samples = _samples(task, influence)
    value = influence["value"].transpose("step", "train", "query").sel(query=list(queried.labels))
    steps, seen, kinds = value["step"].values.tolist(), iter(range(1, value.sizes["step"] + 1)), list[str]()

    def measured(step: int) -> tuple[Array, Array]:
        """Effects ``(side, draw, query)``, the first draw being what was picked; and predicted effects of all."""
        try:
            start = start_at(task, run.load(step))
            check_moves(start)
            orders = window_orders(start, order, window, repeats, seed)
            here = value.sel(step=step).values
            sets = list(_sets(start, samples, here, count, draws, np.random.default_rng((seed, step))))
            schedules = [Schedule.window(samples[rows].tolist(), step, window, weight) for rows in sets]
            effects = window_effects(start, schedules, orders, window, max_replays, batching)
            kinds.append(orders.kind)  # of checkpoints that could be used
        finally:
            if progress is not None:
                progress(next(seen), len(steps))
        shape = (len(queried), len(SIDES), 1 + draws)
        predicted = np.array([(weight - 1) * here[rows].sum(0) for rows in sets])
        return _own(effects.mean(0), shape), _own(predicted, shape)

    found = at_usable(run, steps, measured)
    effects, predicted = (np.stack(parts) for parts in zip(*found.results, strict=True))
    picked, random = effects[:, :, 0], effects[:, :, 1:]
    error = random.std(2, ddof=1) * (1 + 1 / draws) ** 0.5
    dims, nats = ("step", "side", "query"), {"units": "nats"}
    variables = {
        "effect": (dims, picked, nats),
        "predicted": (dims, predicted[:, :, 0], nats),
        "random": (("step", "side", "draw", "query"), random, nats),
        "difference": (dims, picked - random.mean(2), nats),
        "difference_stderr": (dims, error, nats),
    }
    attrs = {"estimator": "ablation of extremes", "window": window, "count": count, "weight": weight, **found.attrs}
    coords = {"step": found.steps, "side": list(SIDES), "query": list(queried.labels)}
    return xr.Dataset(variables, coords, attrs | {"batches": all_kinds(kinds)})


def _samples(task: Task, influence: xr.Dataset) -> Indices:
    """The training sample of every row of the influence."""
    labels = [str(label) for label in influence["train"].values]
    wrong = [label for label in labels if not (label.isdecimal() and int(label) < len(task.train))]
    lacking = sorted(set(query_groups(task).labels) - {str(label) for label in influence["query"].values})
    if wrong:
        raise ValueError(
            f"influence has the train label {wrong[0]!r}, expected indices of single training samples: compute it with "
            "per='sample', or without train groups"
        )
    if lacking:
        raise ValueError(f"influence lacks the queries {lacking}; compute it with this task's queries and their groups")
    return np.array(labels, dtype=np.intp)


def _sets(
    start: Start, samples: Indices, value: Array, count: int, draws: int, generator: np.random.Generator
) -> Iterator[Indices]:
    """For every query and side the rows that are picked, and then the random ones of every draw."""
    if 2 * count > len(samples):
        raise ValueError(
            f"{count} samples on either side are more than half of the {len(samples)} that have an influence"
        )
    losses, groups = _losses(start)[samples], start.task.train_groups
    kinds = np.zeros(len(samples)) if groups is None or groups.ndim == 2 else groups[samples]
    for column in value.T:
        ranked = np.argsort(column, kind="stable")
        for picked in (ranked[:count], ranked[::-1][:count]):
            yield picked
            for _ in range(draws):
                yield _alike(picked, kinds, losses, generator)


def _alike(picked: Indices, kinds: NDArray[np.generic], losses: Array, generator: np.random.Generator) -> Indices:
    """For each row another one that was not picked, of the same kind and of like loss, each once.

    Raises:
        ValueError: there are too few of a kind.
    """
    free = np.ones(len(kinds), dtype=bool)
    free[picked] = False
    found = []
    for row in generator.permutation(picked):
        same = np.flatnonzero(free & (kinds == kinds[row]))
        if not len(same):
            raise ValueError(
                f"no sample of group {kinds[row]} is left to stand beside the {len(picked)} that are picked; pick fewer"
            )
        nearest = same[np.argsort(abs(losses[same] - losses[row]), kind="stable")[:_NEAREST]]
        found.append(generator.choice(nearest))
        free[found[-1]] = False
    return np.array(found)


def _losses(start: Start) -> Array:
    """The loss of every training sample at the checkpoint."""
    task, point = start.task, start.point
    with torch.no_grad():
        parts = [point.sample_losses(start.params, batch)[0].cpu().double() for batch in chunks(task, task.train)]
    return torch.cat(parts).numpy()


def _own(effects: Array, shape: Sequence[int]) -> Array:
    """Of effects ``(set, query)`` those on the query that the set belongs to: ``(side, draw, query)``."""
    by_query = effects.reshape(*shape, -1)
    own: Array = np.stack([by_query[k, :, :, k] for k in range(shape[0])], -1)
    return own
