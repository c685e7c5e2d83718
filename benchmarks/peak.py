"""Most memory that a process has had: what benchmarks share."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_PRESENT = 1  # MCL_CURRENT of mlockall


def peak() -> float:
    """Of the resident set of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> float:
    """Give free memory back to the system, and let the peak be what is held now, MiB: that.

    What is held now stays where it is, as far as the system allows: pages of libraries that are dropped as long as
    nobody reads them would hide as much new memory. NaN where there is no such thing: it takes Linux.
    """
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.mlockall(_PRESENT)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return float("nan")
    return peak()
