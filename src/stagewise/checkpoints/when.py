"""At which steps of training to record: schedules, and whether what a user gave is one."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable

import numpy as np


def log_spaced(last: int, count: int, first: int = 1) -> tuple[int, ...]:
    """Steps that grow by a constant factor, as stages of training tend to.

    Where the factor would round to repeated steps (early on), steps follow one another instead, so exactly
    ``count`` come back whenever there are that many between ``first`` and ``last``. Step 0 has no logarithm:
    add it in front, ``(0, *log_spaced(1000, 30))``.

    Returns:
        Ascending steps, among them ``first`` and ``last``.

    Raises:
        ValueError: unless ``1 <= first <= last`` and ``count >= 2``.

    Example:
        >>> import stagewise as sw
        >>> (0, *sw.log_spaced(1000, 7))
        (0, 1, 3, 10, 32, 100, 316, 1000)
    """
    if not 1 <= first <= last:
        raise ValueError(f"log_spaced needs 1 <= first <= last, got first={first}, last={last}")
    if count < 2:
        raise ValueError(f"count must be at least 2, the first and the last step, got {count}")
    count = min(count, last - first + 1)
    spaced = np.rint(np.geomspace(first, last, count)).astype(int)
    return tuple(np.maximum(spaced, first + np.arange(count)).tolist())


def linear(last: int, every: int) -> tuple[int, ...]:
    """Steps ``0, every, 2 every, ...`` and ``last``, which is included even if it is no multiple.

    Raises:
        ValueError: ``last`` is negative or ``every`` not positive.

    Example:
        >>> import stagewise as sw
        >>> sw.linear(10, every=4)
        (0, 4, 8, 10)
    """
    if last < 0 or every < 1:
        raise ValueError(f"linear needs last >= 0 and every >= 1, got last={last}, every={every}")
    return (*range(0, last, every), last)


def check_steps(steps: Iterable[int]) -> frozenset[int]:
    """The steps as a set.

    Raises:
        ValueError: there are none, or some are negative, repeated or no integers.
    """
    try:
        given = [operator.index(step) for step in steps]
    except TypeError as error:
        raise ValueError(f"steps must be integers, the numbers of updates made: {error}") from error
    if not given:
        raise ValueError("steps is empty: name at least one step to record, e.g. log_spaced(1000, 30)")
    if min(given) < 0:
        raise ValueError(f"steps must not be negative, got {min(given)}; step 0 is the state before training")
    if repeated := sorted(step for step, count in Counter(given).items() if count > 1):
        raise ValueError(f"steps are repeated: {repeated[:5]}")
    return frozenset(given)
