"""Exact influence of what is trained on during a window, on a model that several processes hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.content import content_digest
from stagewise.derivatives import group_gradients
from stagewise.evaluate import in_any_mode
from stagewise.groups import Groups, Labels, query_groups
from stagewise.labelled import Array, influence_dataset
from stagewise.ranks import Ranks
from stagewise.retraining.adjoint import Adjoint
from stagewise.retraining.orders import Orders, all_kinds, window_orders
from stagewise.retraining.schedule import Order
from stagewise.retraining.start import Start, check_moves
from stagewise.retraining.training import weights_of
from stagewise.retraining.updates import Rule, recorded_optimizer
from stagewise.retraining.window_influence import order_spread
from stagewise.sharded.alike import alike
from stagewise.sharded.backwards import ShardedReplay
from stagewise.sharded.check import check_padding
from stagewise.sharded.lent import LentTask, ending, lent, loaded, point_at
from stagewise.task import Task
from stagewise.usable import at_usable, chosen_steps
from stagewise.varied import Per, varied
from stagewise.vector import ParameterVector


@in_any_mode
def window_influence(
    task: Task,
    trajectory: Trajectory | str | Path,
    *,
    window: int,
    per: Per = "group",
    groups: Labels | None = None,
    queries: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    repeats: int | None = None,
    seed: int = 0,
    order: Order | None = None,
    memory: float = 4e9,
    split: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """As :func:`stagewise.window_influence`, of a model that ``fully_shard`` has sharded; all processes call it alike.

    Always in reverse mode: every query group and update costs two forward and backward passes over the update's batch.
    Second derivatives are differences of gradients, and what single samples do differences of losses: the largest
    influence is right to about nine digits in float64, and to about four in float32 (on the tiny models of the tests);
    to fewer where the window is Adam's very first update, see ``differs``. Where differences do not converge, the
    checkpoint is refused.

    Args:
        task: the model, its losses and data; the model has its own weights again afterwards.
        trajectory: the run's checkpoints, with optimiser and optimiser state, or their folder. Of folders of
            ``torch.distributed.checkpoint`` every process reads the parts in which its rows are, of safetensors files
            its rows.
        window: number of updates.
        per: influence of each train group, each candidate, or each token of the candidates.
        groups: label of every training sample, or of every token ``(samples, tokens)``; default ``task.train_groups``.
        queries: names of the query groups; default all. Each costs time.
        steps: the checkpoints to start from; default all.
        repeats: number of batch orders to average over; default the run's own alone where it is known, else four.
        seed: of the fresh ones.
        order: the recorded run's own batch order, used as the first.
        memory: bytes that replayed states and adjoints may take in each process.
        split: whether the samples of a batch are divided among the processes; else each evaluates all of them.
        progress: called with (checkpoints done, checkpoints in all) after every checkpoint.

    Returns:
        ``value`` and ``stderr`` ``(step, train, query)`` in every process, nats per unit weight of one sample (token).
        Negative is helpful. ``differs (step)``: the relative change of differences of gradients and of all losses
        together, in the last update (and in Adam's first), when they are taken over a step three times as long, whose
        length is chosen where that is small; refused above 0.05. Their error is about an eighth of it where it comes
        from the length, and as large where it is rounding; sums over samples that cancel have a larger one.

    Raises:
        ValueError: the model is sharded in a way that is not supported, the processes were not given the same, or no
            checkpoint can be used, with the reasons.
        RuntimeError: in one process, which ends the others: its samples cannot be read or evaluated any more.

    Example:
        >>> import torch, stagewise as sw, stagewise.sharded
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),  # in several processes: sharded by fully_shard
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.model.state_dict(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> exact = sw.sharded.window_influence(task, sw.Trajectory.from_checkpoints([start]), window=3)
        >>> exact.value.dims, exact.value.shape
        (('step', 'train', 'query'), (1, 2, 1))
    """
    if window < 1 or (repeats is not None and repeats < 1) or memory <= 0:
        raise ValueError(f"need window >= 1, repeats >= 1 and memory > 0, got {window}, {repeats} and {memory}")
    run = as_trajectory(trajectory)
    chosen, kinds, counts = chosen_steps(run, steps), list[str](), list[int]()
    asked: dict[str, Any] = {"window": window, "repeats": repeats, "seed": seed, "memory": memory, "steps": chosen}
    asked |= {"per": per, "groups": groups, "list of queries asked for": queries}
    with lent(task, split, **asked) as own:
        queried = query_groups(own)
        queried = queried if queries is None else queried.named(queries)
        trained, seen = varied(own, per, groups), iter(range(1, len(chosen) + 1))

        def exact(step: int) -> tuple[Array, Array, float]:
            """Influence ``(train, query)`` at a checkpoint, its standard error, and whether differences converge."""
            try:
                start = _start(own, run, step)
                check_moves(start)
                orders, span = _orders(own.ranks, start, order, window, repeats, seed), range(step, step + window)
                replays = [ShardedReplay(start, batches, span, memory, "loop") for batches in orders.orders]
                found = [_backwards(replay, trained, queried) for replay in replays]
                sums, differs = np.stack([each for each, _ in found]), max(differs for _, differs in found)
                kinds.append(orders.kind)  # of checkpoints that could be used
                counts.append(len(orders.orders))
            finally:
                if progress is not None:
                    with ending():
                        progress(next(seen), len(chosen))
            sizes = np.array(trained.sizes)[:, None]
            return sums.mean(0) / sizes, order_spread(sums, orders.known) / sizes, differs

        found = at_usable(run, steps, exact)
    value, stderr, differs = (np.stack(parts) for parts in zip(*found.results, strict=True))
    attrs = {
        "estimator": "exact influence",
        "window": window,
        "repeats": min(counts),
        "mode": "reverse",
        "derivatives": "differences",
        "batches": all_kinds(kinds),
        "expected": 0,
        **found.attrs,
    }
    return influence_dataset(value, stderr, found.steps, trained, queried, attrs).assign(differs=("step", differs))


def _start(task: LentTask, run: Trajectory, step: int) -> Start:
    """As :func:`stagewise.retraining.start.start_at` finds it."""
    fitted = loaded(task, run, step)
    optimizer, point = recorded_optimizer(fitted), point_at(task, fitted)
    check_padding(point, task.ranks)
    if optimizer.clip_norm is not None:
        # The norm that decides is that of all gradients, also of parameters that are not updated.
        point = replace(point, vector=ParameterVector.of(task))
    return Start(point, fitted, Rule.of(optimizer, point.vector, fitted.step, fitted.coming_rates))


def _orders(ranks: Ranks, start: Start, given: Order | None, window: int, repeats: int | None, seed: int) -> Orders:
    """The batch orders of the window, the same in all processes."""
    found: list[Orders] = []

    def made() -> dict[str, str]:
        found.append(window_orders(start, given, window, repeats, seed))
        batches = [batches(start.step + k) for batches in found[0].orders for k in range(window)]
        return {"order": content_digest(batches)}

    alike(ranks, made)
    return found[0]


def _backwards(replay: ShardedReplay, trained: Groups, queried: Groups) -> tuple[Array, float]:
    """Derivatives ``(train, query)`` by the weight of each group during the replay, from its end back.

    And the relative change of a product over a longer step.
    """
    size, places = replay.at_once, trained.places(len(replay.start.task.train))
    stacks = (queried.chosen(slice(first, first + size)) for first in range(0, len(queried), size))
    sums, differs = zip(*(_sums(replay, places, len(trained), stack) for stack in stacks), strict=True)
    return torch.cat(sums).numpy().T, max(differs)


def _sums(replay: ShardedReplay, places: Tensor, rows: int, queried: Groups) -> tuple[Tensor, float]:
    """Derivatives of some query groups by the weight of each group: ``(query, train)``, float64, on the CPU."""
    ranks, states = replay.start.task.ranks, replay.states()
    _, state = next(states)
    sums = torch.zeros(len(queried), rows + 1, dtype=torch.float64, device=state.params.device)
    adjoint = Adjoint.of(group_gradients(replay.start.point, state.params[0], queried))
    del state  # before earlier ones are made again
    lengths, differs = list[float](), 0.0
    for step, state in states:
        by_weight, lengths, changed = replay.back(state, step, adjoint, [] if replay.looks(step) else lengths)
        del state
        differs = max(differs, changed)
        with ending():
            where = weights_of(by_weight[0], places[replay.own_rows(step)]).to(sums.device)
        sums.index_add_(1, where.expand_as(by_weight[0]).flatten(), by_weight.flatten(1))
    return ranks.over_samples(sums)[:, :rows].cpu(), differs
