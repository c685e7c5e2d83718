"""Does retraining repeat the run? What cannot be known from a checkpoint is measured here.

From every checkpoint training goes on unchanged to the next one that was recorded, and is held against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.evaluate import at, in_any_mode
from stagewise.groups import query_groups
from stagewise.retraining.losses import query_losses
from stagewise.retraining.schedule import BatchOrder, LearningRate, Order, Schedule
from stagewise.retraining.start import Start, check_order, own_order, start_at
from stagewise.retraining.training import train
from stagewise.retraining.updates import Rule
from stagewise.task import Task
from stagewise.usable import chosen_steps

LIKE_RUN = "a like run, not this one: the batches are not known"

# Up to this share of what the window changes a replay is the run itself; rounding alone can reach it.
_SAME = 0.01


@in_any_mode
def replay(
    task: Task,
    trajectory: Trajectory | str | Path,
    order: Order | None = None,
    steps: Sequence[int] | None = None,
    *,
    longest: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Repeat the run unchanged from each checkpoint to the next recorded one, and say by how much that misses it.

    The updates are those that all retraining makes, with the learning rates that were recorded. What a checkpoint does
    not say (layers in train mode, other batches, an unusual loop) shows as a distance:

        miss = |w replayed - w recorded| / |w recorded - w at the start|     over the parameters that are updated,

    and ``loss_miss`` is the same of query losses: the largest error of a change, over the largest change. The batches
    are known where each is the whole training set, where later checkpoints have recorded them
    (``Checkpoint.coming_batches``), or an ``order`` is given; elsewhere nothing is replayed.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser and optimiser state, or their folder.
        order: the samples of every update of the run; default those that were recorded.
        steps: the checkpoints to start from; default all that have one after them.
        longest: windows of more updates are not replayed.
        progress: called with (checkpoints done, checkpoints in all) after every checkpoint.

    Returns:
        By ``step`` of the start: ``miss`` and ``loss_miss``, NaN where nothing was replayed; ``updates`` to the next
        checkpoint; ``verdict`` in words. Attribute ``verdict`` sums them up; ``omitted``: the checkpoints that could
        not be used, with reasons (JSON).

    Raises:
        ValueError: a step is not recorded. A checkpoint that cannot be used raises nothing.

    Example:
        >>> import torch, stagewise as sw
        >>> from stagewise.retraining.training import train_and_record
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)},
        ... )
        >>> recorded = train_and_record(task, sw.Optimizer("sgd", 0.1), sw.BatchOrder(4), [0, 5, 10])
        >>> sw.replay(task, sw.Trajectory.from_checkpoints(recorded)).attrs["verdict"]
        'the replay repeats the run: it misses at most 0.00 % of what a window changes'
    """
    run = as_trajectory(trajectory)
    after = dict(pairwise(run.steps))
    chosen = [step for step in (chosen_steps(run, steps) if steps is not None else run.steps) if step in after]
    outcomes = []
    for done, step in enumerate(chosen, start=1):
        outcomes.append(_outcome(task, run, order, step, after[step], longest))
        if progress is not None:
            progress(done, len(chosen))
    omitted = {str(step): o.verdict for step, o in zip(chosen, outcomes, strict=True) if o.unusable}
    variables = {
        "miss": ("step", [o.miss for o in outcomes], {"units": "1"}),
        "loss_miss": ("step", [o.loss_miss for o in outcomes], {"units": "1"}),
        "updates": ("step", [after[step] - step for step in chosen]),
        "verdict": ("step", np.array([o.verdict for o in outcomes], dtype=np.str_)),
    }
    attrs = {"verdict": _summary(chosen, outcomes), "longest": longest, "omitted": json.dumps(omitted)}
    return xr.Dataset(variables, {"step": chosen}, attrs)


@dataclass(frozen=True)
class _Outcome:
    """Of one window: how far the replay was off, or why there was none."""

    verdict: str
    miss: float = np.nan
    loss_miss: float = np.nan
    notes: tuple[str, ...] = ()
    unusable: bool = False


def _outcome(task: Task, run: Trajectory, order: Order | None, step: int, stop: int, longest: int) -> _Outcome:
    try:
        checkpoint, target = run.load(step), run.load(stop)
        rates, notes = _learning_rates(checkpoint, target)
        start = start_at(task, checkpoint)
        batches = _batches(start, order, stop - step)
        if batches is None:
            return _Outcome("; ".join([LIKE_RUN, *notes]))
        if stop - step > longest:
            return _Outcome(f"not replayed: {stop - step:,} updates are more than longest={longest:,}")
        return _replayed(start, target, batches, rates, notes)
    except ValueError as error:
        return _Outcome(f"cannot be replayed: {error}", unusable=True)


def _learning_rates(checkpoint: Checkpoint, target: Checkpoint) -> tuple[LearningRate | None, list[str]]:
    """The learning rate of every update between two checkpoints, and what is not known of the run."""
    notes = []
    if kinds := sorted({*checkpoint.train_mode, *target.train_mode}):
        notes.append(f"trained with {', '.join(kinds)} in train mode; retrained in eval mode")
    recorded, count = target.learning_rates, target.step - checkpoint.step
    if len(recorded) < count:
        return None, [*notes, "learning rates were not recorded; the checkpoint's was held"]
    return lambda step: recorded[step - target.step], notes


def _batches(start: Start, order: Order | None, count: int) -> Order | None:
    n, size = len(start.task.train), start.rule.optimizer.batch_size
    if order is not None:
        check_order(start, order)
        return order
    if (own := own_order(start, count)) is not None:
        return own
    return BatchOrder(n) if size is not None and (size == 0 or size >= n) else None


def _replayed(start: Start, target: Checkpoint, order: Order, rates: LearningRate | None, notes: list[str]) -> _Outcome:
    end, fitted = at(start.task, target)
    if not start.rule.rates.any() and fitted.optimizer is not None and fitted.optimizer.learning_rate > 0:
        # In front of a warm-up only the next checkpoint knows how the rates of groups compare.
        groups, rate = fitted.optimizer.groups, fitted.optimizer.learning_rate
        optimizer = replace(start.rule.optimizer, groups=groups, learning_rate=rate)
        start = replace(start, rule=Rule.of(optimizer, start.point.vector))
        rates = rates or (lambda _: 0.0)
    steps = range(start.step, target.step)
    state = train(start, start.state(), [Schedule()], order, steps, learning_rate=rates)
    vector = start.point.vector
    recorded = vector.flatten(end.state)
    updated = vector.spread(start.rule.updated).to(recorded.device)
    change, error = (
        (w - v)[updated].cpu().double() for w, v in ((recorded, start.params), (state.params[0], recorded))
    )
    queried = query_groups(start.task)
    places = torch.stack([start.params, state.params[0]])
    began, replayed = query_losses(start.point, places, queried, "loop")
    ended = query_losses(replace(end, vector=vector), recorded[None], queried, "loop")[0]
    miss = _share(float(error.norm()), float(change.norm()))
    loss_miss = _share(float((replayed - ended).abs().max()), float((ended - began).abs().max()))
    words = f"misses the run by {_percent(miss)} of what these {len(steps):,} updates change"
    if miss <= _SAME:
        words = f"repeats the run, but for {_percent(miss)} of what these {len(steps):,} updates change"
    words += f" (query losses: {_percent(loss_miss)})"
    return _Outcome("; ".join([words, *notes]), miss, loss_miss, tuple(notes))


def _share(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else float("inf")
    return part / whole


def _summary(steps: Sequence[int], outcomes: Sequence[_Outcome]) -> str:
    """One sentence for people."""
    misses = {step: o.miss for step, o in zip(steps, outcomes, strict=True) if not np.isnan(o.miss)}
    if not misses:
        reasons = list(dict.fromkeys(outcome.verdict for outcome in outcomes))
        return "; ".join(reasons) if reasons else "nothing to replay: no checkpoint has another one after it"
    worst, typical = max(misses, key=misses.__getitem__), float(np.median(list(misses.values())))
    if misses[worst] <= _SAME:
        sentence = f"the replay repeats the run: it misses at most {_percent(misses[worst])} of what a window changes"
    else:
        sentence = f"the replay misses the run by {_percent(typical)} of what the window changes"
        if len(misses) > 1:
            sentence += f" (median of {len(misses)} windows; {_percent(misses[worst])} from step {worst})"
    notes = list(dict.fromkeys(note for outcome in outcomes for note in outcome.notes))
    if left := len(outcomes) - len(misses):
        notes.append(f"{left} of {len(outcomes)} windows were not replayed")
    return "; ".join([sentence, *notes])


def _percent(share: float) -> str:
    return (
        f"{100 * share:.2f} %" if share < 0.0995 / 10 else f"{100 * share:.2g} %" if share < 0.995 else f"{share:.0%}"
    )
