"""The part of a run in which sample weights are varied: a range of its updates."""

from __future__ import annotations

import sys
from collections.abc import Sequence

WHOLE_RUN = range(sys.maxsize)
"""Every update, whenever the run starts and ends."""


def check_during(during: range | None, steps: Sequence[int]) -> range:
    """The range of updates, or the whole run if there is none.

    Args:
        during: the updates whose weights are varied.
        steps: from the start of the run to the last step that is looked at, ascending.

    Raises:
        ValueError: the range is empty, has gaps, or holds no update between the first and the last step.
    """
    if during is None:
        return WHOLE_RUN
    if not isinstance(during, range) or not during or during.step != 1:
        raise ValueError(f"during must be a range of consecutive updates, e.g. range(100, 150), got {during}")
    if steps and (during.stop <= steps[0] or steps[-1] <= during.start):
        raise ValueError(
            f"during {during} lies outside the updates from step {steps[0]} to step {steps[-1]}, so that nothing "
            "would be varied; choose a range within them, or look at later steps"
        )
    return during


def during_attrs(during: range | None) -> dict[str, list[int]]:
    """The range as an attribute of a result; none for the whole run."""
    return {"during": [during.start, during.stop]} if during is not None else {}
