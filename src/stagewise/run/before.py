"""What is looked at before the first cell: checkpoints that can be used, a task that is the same each time.

And what a folder holds already is compared, in numbers, with what the task gives now.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.evaluate import at
from stagewise.identity import GRADIENT, Probe, all_losses, changes, identity, part_of, probe, rounding, same
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task
from stagewise.tokens import check_classes
from stagewise.traces.store import RunMismatchError, TraceStore


def look(
    task: Task, trajectory: Trajectory, posterior: LocalPosterior, steps: Sequence[int], sampled: bool = True
) -> tuple[dict[int, str], dict[int, str]]:
    """Try every checkpoint, and where it will be ``sampled`` its posterior, before the work.

    Returns:
        The content hash of every checkpoint that can be used, and the reasons why others cannot, by step.

    Raises:
        ValueError: none can be used, or there is a class of tokens of which none counts.
    """
    usable, unusable = {}, {}
    cause: ValueError | None = None
    for step in steps:
        try:
            checkpoint = trajectory.load(step)
            if sampled:
                posterior.at(task, checkpoint)
            else:
                at(task, checkpoint, train=False)
            usable[step] = task.fitted(checkpoint).digest
            if posterior.window and (rates := checkpoint.changing_rates(posterior.window)):
                usable[step] += f" {rates}"
        except ValueError as error:
            unusable[step], cause = str(error), error
    if not usable:
        # What is wrong with the task is the same at all of them, but for the step it names.
        reasons = {
            re.sub(rf"\bstep ?{step}\b", "step", reason): f"step {step}: {reason}" for step, reason in unusable.items()
        }
        only = len(reasons) == 1
        raise ValueError(
            next(iter(unusable.values())) if only else "no checkpoint can be used. " + "; ".join(reasons.values())
        ) from cause
    check_classes(task)
    return usable, unusable


def check_same_task(
    again: Task, parts: dict[str, str] | None, trajectory: Trajectory, known: tuple[int, Probe]
) -> None:
    """Refuse a task that was built a second time and is not the first.

    Args:
        again: the task.
        parts: :func:`stagewise.identity.identity` of the first, of code by its instructions; None where the first was
            sent itself.
        trajectory: the checkpoints.
        known: a step, and the probe of the first there.

    Raises:
        ValueError: with the parts that differ.
    """
    now = identity(again, text=False) if parts is not None else {}
    parts = parts or {}
    differ = [part for part in sorted({*parts, *now}) if parts.get(part) != now.get(part)]
    if not differ:
        step, first = known
        checkpoint = again.fitted(trajectory.load(step))
        differ = changes(first, probe(again, checkpoint), probe(again, checkpoint, rounded=True))
    if differ:
        raise ValueError(
            f"task() is not deterministic: its {_listed(differ)} {_verb(differ)} between two calls; seed the split, "
            "and whatever else is drawn at random in it"
        )


def check_reusable(store: TraceStore, task: Task, trajectory: Trajectory, single_tokens: bool = False) -> None:
    """Compare what is in the folder with what the task gives now, in numbers.

    Raises:
        RunMismatchError: a loss or the model has changed since.
    """
    for step in sorted(set(store.steps) & set(trajectory.steps)):
        stored = [store.evidence(step, block) for of, block in store.blocks if of == step]
        if not any(first for first, _ in stored):
            continue  # there is no posterior
        checkpoint = task.fitted(trajectory.load(step))
        now, rounded = probe(task, checkpoint), probe(task, checkpoint, rounded=True)
        losses = all_losses(task, checkpoint, single_tokens)
        for first, anchors in stored:
            differ = set(changes(first, now, rounded))
            for path, anchor in anchors.items():
                part = part_of(path)
                if not same(anchor, losses[path], rounding(now[part], rounded[part])):
                    differ.add(part)
            if differ:
                raise RunMismatchError(no_longer(store.place, step, differ))


def no_longer(place: object, step: int, differ: set[str]) -> str:
    """What to say of a folder whose task was another one, by the parts whose numbers differ."""
    if differ == {GRADIENT}:
        what = f"{place}: the {GRADIENT} at step {step} is no longer the one"
    else:
        what = f"{place}: the losses at step {step} ({_listed(differ - {GRADIENT})}) are no longer those"
    return (
        f"{what} that its results are of: the loss or the model has changed. Results of both must not be mixed: give "
        "this run another folder (out=...), or delete that one if it is no longer wanted"
    )


def _listed(words: Iterable[str]) -> str:
    *others, last = sorted(words)
    return f"{', '.join(others)} and {last}" if others else last


def _verb(parts: Sequence[str]) -> str:
    return "differs" if len(parts) == 1 and not parts[0].endswith("data") else "differ"
