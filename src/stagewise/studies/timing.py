"""How long work takes, from a little of it."""

from __future__ import annotations

import time
from collections.abc import Callable


def of_window(work: Callable[[int], object], length: int) -> float:
    """Seconds of a window, from those of short ones: some are for its ends, however long it is."""
    work(1)  # what is checked when a task meets a checkpoint, is checked once
    one, three = timed(lambda: work(1)), timed(lambda: work(3))
    return one + (length - 1) * (three - one) / 2


def timed(work: Callable[[], object]) -> float:
    """Seconds of processor time, which other work on the machine does not change much."""
    start = time.process_time()
    work()
    return time.process_time() - start
