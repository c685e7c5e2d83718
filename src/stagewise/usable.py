"""What every estimator does at every checkpoint: one that cannot be used is left out with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.evaluate import in_any_mode

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """One result for each checkpoint that could be used.

    Attributes:
        steps: of these checkpoints, ascending.
        results: one for each.
        omitted: why the others were left out, by step.
    """

    steps: list[int]
    results: list[T]
    omitted: dict[int, str]

    @property
    def attrs(self) -> dict[str, str]:
        """``omitted`` as an attribute of a dataset: JSON, like that of all estimators."""
        return {"omitted": json.dumps({str(step): reason for step, reason in self.omitted.items()})}


def chosen_steps(trajectory: Trajectory, steps: Sequence[int] | None) -> list[int]:
    """The steps asked for, default all.

    Raises:
        ValueError: a step has no checkpoint, or no step is asked for.
    """
    chosen = list(trajectory.steps if steps is None else steps)
    unknown = sorted(set(chosen) - set(trajectory.steps))
    if unknown or not chosen:
        raise ValueError(f"steps {unknown} have no checkpoint; there are {list(trajectory.steps)}")
    return chosen


@in_any_mode
def at_usable(trajectory: Trajectory, steps: Sequence[int] | None, estimate: Callable[[int], T]) -> Found[T]:
    """``estimate(step)`` at every chosen checkpoint that can be used.

    Args:
        trajectory: the run's checkpoints.
        steps: which, default all.
        estimate: raises ValueError (as ``CheckpointError`` is) where a checkpoint cannot be used.

    Raises:
        ValueError: a step is not recorded, or no checkpoint can be used, with the reasons.
    """
    found: dict[int, T] = {}
    omitted: dict[int, str] = {}
    cause: ValueError | None = None
    for step in chosen_steps(trajectory, steps):
        try:
            found[step] = estimate(step)
        except ValueError as error:
            omitted[step], cause = str(error), error
    if not found:
        raise ValueError(none_usable(omitted)) from cause
    return Found(list(found), list(found.values()), omitted)


def none_usable(omitted: dict[int, str]) -> str:
    """Why nothing could be computed; a reason that all checkpoints share is said once."""
    reasons = list(dict.fromkeys(omitted.values()))
    if len(reasons) == 1:
        return reasons[0]
    listed = "; ".join(f"step {step}: {reason}" for step, reason in omitted.items())
    return f"no checkpoint can be used. {listed}"
