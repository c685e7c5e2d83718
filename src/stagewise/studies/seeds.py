"""What a handful of runs that differ in their seed say together."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from stagewise.dynamics.curves import critical


def t_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over seeds, and both ends of the interval of Student's t.

    Args:
        values: one for each seed; a mean with NaN among them is NaN, and one alone has no interval (NaN).
        level: coverage.
    """
    each = np.asarray(values, dtype=float)
    mean, n = float(each.mean()), len(each)
    if n < 2:
        return mean, float("nan"), float("nan")
    reach = critical(1 - level, n - 1) * float(each.std(ddof=1)) / n**0.5
    return mean, mean - reach, mean + reach
