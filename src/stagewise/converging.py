"""Over how long a step are differences taken? Over one at which they stay the same when it is three times as long."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

# In units of the usual step, which is as long as rounding asks for where all weights change alike. Directions of large
# models often have low rank: a change that is small beside a matrix may be large beside its largest singular value.
_LENGTHS = tuple(3.0**power for power in range(-5, 2))
CONVERGED = 0.05
"""By how much differences may change when the step is three times as long."""


def converging(differences: Callable[[float], T], changed: Callable[[T, T], float]) -> tuple[float, float]:
    """The length at which differences change least when it is three times as long, and by how much they do.

    Args:
        differences: over a step of a length.
        changed: the relative change from those over one step to those over another.
    """
    found, before = list[tuple[float, float]](), differences(_LENGTHS[0])
    for length, longer in pairwise(_LENGTHS):
        after = differences(longer)
        found.append((changed(before, after), length))
        before = after
    differs, length = min(found)
    return length, differs
