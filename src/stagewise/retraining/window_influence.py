"""Exact influence of what is trained on during a window: the derivative of the replayed window.

``window_ablation`` measures what a finite change of weight does; this is its limit for small changes, for every group,
sample or token at once. Curvature is not frozen and nothing is fitted, so that no checkpoint is refused: where
training is a sequence of updates, it has a derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.derivatives import group_gradients
from stagewise.groups import Groups, Labels, query_groups
from stagewise.labelled import Array, influence_dataset
from stagewise.retraining.adjoint import Adjoint, Replay, step_back
from stagewise.retraining.expected import expected_sums
from stagewise.retraining.horizon import misses
from stagewise.retraining.orders import all_kinds, window_orders
from stagewise.retraining.schedule import Order, Schedule
from stagewise.retraining.start import check_moves, start_at
from stagewise.retraining.training import weights_of
from stagewise.retraining.unrolling import derivatives_along
from stagewise.stacking import BatchingChoice
from stagewise.task import Task
from stagewise.usable import at_usable, chosen_steps
from stagewise.varied import Per, varied

Mode = Literal["auto", "reverse", "forward"]


def window_influence(
    task: Task,
    trajectory: Trajectory | str | Path,
    *,
    window: int,
    per: Per = "group",
    expected: bool = False,
    groups: Labels | None = None,
    queries: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    repeats: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    mode: Mode = "auto",
    check: bool = False,
    memory: float = 4e9,
    scratch: str | Path | None = None,
    batching: BatchingChoice = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Exact influence on every query group of what is trained on during a window from every checkpoint.

    The run is continued from each checkpoint for ``window`` updates, as :func:`window_ablation` continues it, and the
    replay is differentiated update by update, with its own optimiser, rates, clipping and batches:

        value[i, j] = d (mean loss of query group j after the window) / d (weight of group i in it) / (size of i)

    It is what ``window_ablation`` measures per unit of an infinitely small change, so that ``predicted_effect`` of this
    and that pair up by name. A sample's influence on itself is in it. Reverse mode makes one product of second order
    for every query group and update, whatever the number of train groups; forward mode one for every train group.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser and optimiser state, or their folder.
        window: number of updates.
        per: influence of each train group, each candidate, or each token of the candidates.
        expected: influence of weight in every update at the rate at which a sample is drawn, whether or not the
            window's batches hold it: of candidates that were not trained on during the window. From a few updates on
            the way, evenly spaced, with passes over the training set; in reverse mode.
        groups: label of every training sample, or of every token ``(samples, tokens)``; default ``task.train_groups``,
            or every candidate alone if there are at most 64. With ``per="group"`` only.
        queries: names of the query groups, as results carry them; default all. In reverse mode each costs time.
        steps: the checkpoints to start from; default all.
        repeats: number of batch orders to average over, one where the batch is the whole set; default the run's own
            alone where it is known, else four.
        seed: of the fresh ones.
        order: the recorded run's own batch order, used as the first. By default that of the batches which later
            checkpoints have recorded (``Checkpoint.coming_batches``), where they cover the window; else all orders are
            fresh.
        mode: ``"reverse"``, ``"forward"`` (groups only), ``"auto"``: forward where there are fewer train groups than
            query groups.
        check: also train the window again with the weights of all groups changed by 1 % and by 10 %, each up or down
            at random, and reversed: how far is the derivative from what changes that can be made do? It costs about
            four windows of training.
        memory: bytes that replayed states and adjoints may take, beside the model, its data and one gradient. With less
            memory more updates are made again, and queries wait for one another.
        scratch: folder on a disk for the states that memory does not hold, in place of making updates again; at most
            half of what is free there. Nothing stays in it.
        batching: whether query groups share a product: ``"stacked"``, ``"loop"``: one by one, ``"auto"``: stacked if
            the model allows it.
        progress: called with (checkpoints done, checkpoints in all) after every checkpoint.

    Returns:
        ``value`` and ``stderr`` ``(step, train, query)``, nats per unit weight of one sample (token). Negative is
        helpful. The standard error is that over batch orders: 0 where there is one that is known, NaN where there is
        one that was drawn. Where ``expected``, the difference that half of the updates on the way would make is in it.
        With ``check`` also ``miss`` ``(step)``, its relative error over the queries for the change that it fits better:
        above .1 a change of some per cent is not small there, as at kinks of ReLU or where Adam divides by next to
        nothing. Coordinates ``train_size`` and ``query_size``; attributes ``mode``, ``batches`` ("recorded", "given",
        "whole training set", "fresh", ...) and ``omitted``, the checkpoints that could not be used, with reasons.

    Raises:
        ValueError: no checkpoint can be used, with the reasons: as :func:`window_ablation`, or an operation has no
            second derivative; a step is not recorded, there are no groups, or ``per`` and ``groups`` or ``mode``
            exclude one another.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> exact = sw.window_influence(task, sw.Trajectory.from_checkpoints([start]), window=3)
        >>> exact.value.dims, exact.value.shape
        (('step', 'train', 'query'), (1, 2, 1))
    """
    if window < 1 or (repeats is not None and repeats < 1) or memory <= 0:
        raise ValueError(f"need window >= 1, repeats >= 1 and memory > 0, got {window}, {repeats} and {memory}")
    run, queried = as_trajectory(trajectory), query_groups(task)
    queried = queried if queries is None else queried.named(queries)
    trained = varied(task, per, groups)
    forward = not expected and _is_forward(mode, per, len(trained), len(queried))
    if expected and (check or mode == "forward"):
        raise ValueError("expected=True is found backwards, of no change that is made; leave out mode='forward', check")
    folder = None if scratch is None else Path(scratch)
    total, seen = len(chosen_steps(run, steps)), iter(range(1, len(run.steps) + 1))
    kinds, counts = list[str](), list[int]()
    rows = [query_groups(task).labels.index(label) for label in queried.labels]

    def exact(step: int) -> tuple[Array, Array, float]:
        """Influence ``(train, query)`` at a checkpoint, its standard error, and by how much it misses changes."""
        try:
            start = start_at(task, run.load(step), curvature=True)
            check_moves(start)
            orders = window_orders(start, order, window, repeats, seed)
            way, span = start.decided(batching, len(queried)), range(step, step + window)
            replays = [Replay(start, batches, span, memory, way, scratch=folder) for batches in orders.orders]
            if expected:
                sums, off = map(np.stack, zip(*(expected_sums(r, trained, queried) for r in replays), strict=True))
            else:
                sums = np.stack(
                    [_forwards(r, trained)[:, rows] if forward else _backwards(r, trained, queried) for r in replays]
                )
                off = np.zeros_like(sums)
            spread, miss = order_spread(sums, orders.known), np.nan
            if check:
                miss = max(_miss(each, r, trained, rows) for each, r in zip(sums, replays, strict=True))
            kinds.append(orders.kind)  # of checkpoints that could be used
            counts.append(len(orders.orders))
        finally:
            if progress is not None:
                progress(next(seen), total)
        sizes = np.array(trained.sizes)[:, None]
        return sums.mean(0) / sizes, np.hypot(spread, off.mean(0)) / sizes, miss

    found = at_usable(run, steps, exact)
    value, stderr, miss = (np.stack(parts) for parts in zip(*found.results, strict=True))
    attrs = {
        "estimator": "exact influence",
        "window": window,
        "repeats": min(counts),
        "mode": "forward" if forward else "reverse",
        "batches": all_kinds(kinds),
        "expected": int(expected),
        **found.attrs,
    }
    influence = influence_dataset(value, stderr, found.steps, trained, queried, attrs)
    return influence.assign(miss=("step", miss)) if check else influence


def _miss(sums: Array, replay: Replay, trained: Groups, queries: Sequence[int]) -> float:
    """Relative error of derivatives ``(train, query)`` for changes that are made, see :func:`misses`."""
    slopes = torch.from_numpy(sums)[None, None]
    return float(misses(slopes, replay, trained, [replay.span], [replay.span.stop], queries))


def _is_forward(mode: Mode, per: Per, trained: int, queried: int) -> bool:
    """Whether one derivative per train group is carried forwards, and not one per query group backwards."""
    if mode == "forward" and per != "group":
        raise ValueError(f"mode='forward' carries one derivative per train group; use mode='reverse' for per={per!r}")
    return mode == "forward" or (mode == "auto" and per == "group" and trained < queried)


def _forwards(replay: Replay, trained: Groups) -> Array:
    """Derivatives ``(train, query)`` by the weight of each group during the replay, carried along it."""
    start, span, size = replay.start, replay.span, replay.at_once
    schedules = [Schedule.window(index, span.start, len(span), 2.0, trained.tokens) for index in trained.indices]
    stacks = (schedules[first : first + size] for first in range(0, len(schedules), size))
    parts = [derivatives_along(start, stack, replay.order, [span.stop], replay.learning_rate)[0] for stack in stacks]
    return torch.cat(parts).numpy()


def _backwards(replay: Replay, trained: Groups, queried: Groups) -> Array:
    """Derivatives ``(train, query)`` by the weight of each group during the replay, from its end back."""
    size, places = replay.at_once, trained.places(len(replay.start.task.train))
    stacks = (queried.chosen(slice(first, first + size)) for first in range(0, len(queried), size))
    return torch.cat([_sums(replay, places, len(trained), stack) for stack in stacks]).numpy().T


def _sums(replay: Replay, places: Tensor, rows: int, queried: Groups) -> Tensor:
    """Derivatives of some query groups by the weight of each group: ``(query, train)``, float64, on the CPU."""
    sums, states = torch.zeros(len(queried), rows + 1, dtype=torch.float64), replay.states()
    _, state = next(states)
    adjoint = Adjoint.of(group_gradients(replay.start.point, state.params[0], queried))
    del state  # before earlier ones are made again
    for step, state in states:
        by_weight = step_back(replay, state, step, adjoint).by_weight
        del state
        where = weights_of(by_weight[0], places[replay.order(step)])
        sums.index_add_(1, where.expand_as(by_weight[0]).flatten(), by_weight.cpu().double().flatten(1))
    return sums[:, :rows]


def order_spread(sums: Array, known: bool) -> Array:
    """Standard error over batch orders ``(repeat, ...)``: 0 for one that is known, NaN for one that was drawn."""
    if len(sums) > 1:
        error: Array = sums.std(0, ddof=1) / len(sums) ** 0.5
        return error
    return np.full(sums.shape[1:], 0.0 if known else np.nan)
