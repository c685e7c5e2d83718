"""Over how long a step are differences taken? Over one at which they stay the same when it is three times as long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# In units of the usual step, which is as long as rounding asks for where all weights change alike. Directions of large
# models often have low rank: a change that is small beside a matrix may be large beside its largest singular value.
_SHORTEST, _USUAL = -5, 1  # powers of three
# A direction may be large where it changes nothing, as Adam's first update makes it where a gradient is 0. Where
# differences have converged, longer steps are tried as long as they are better; where they have not, such steps would
# only show what the function is like far away.
_LONGEST = 16
CONVERGED = 0.05
"""By how much differences may change when the step is three times as long."""


def converging(differences: Callable[[float], T], changed: Callable[[T, T], float]) -> tuple[float, float]:
    """The length at which differences change least when it is three times as long, and by how much they do.

    Args:
        differences: over a step of a length.
        changed: the relative change from those over one step to those over another.
    """
    found, before = list[tuple[float, float]](), differences(3.0**_SHORTEST)
    for power in range(_SHORTEST, _LONGEST):
        after = differences(3.0 ** (power + 1))
        found.append((changed(before, after), 3.0**power))
        best = min(found)
        better = best[0] <= CONVERGED and best in found[-2:]  # of two, one may be worse by luck
        if power + 1 >= _USUAL and not better:
            break
        before = after
    differs, length = best
    return length, differs
