"""Memory that a cell needs, by what it is needed for. What chains take is measured, all else is counted."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stagewise.sampling.chains import Chains
from stagewise.sampling.watch import DRAWN, Seen

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_SINGLE, _DOUBLE = 4.0, 8.0  # bytes of a number: as draws are kept and written, and as traces
_STATM = Path("/proc/self/statm")


class Room(NamedTuple):
    """Bytes beyond what was held before a few steps and draws.

    Attributes:
        taken: most of them while these were made.
        held: those that stayed: libraries that are loaded on first use, and what is kept for all checkpoints.
    """

    taken: float
    held: float


def losses(seen: Mapping[str, Seen], sampling: Chains) -> list[int]:
    """Numbers in every array of losses of a cell, from a few draws of it."""
    draws = sampling.chains * sampling.looks[-1]
    kinds = [getattr(of_set, kind) for of_set in seen.values() for kind in DRAWN]
    return [draws * kind[0, 0].numel() for kind in kinds if kind is not None]


def most(room: Room, chains: float, losses: Sequence[int], file: float) -> float:
    """Most bytes at any time.

    Args:
        room: what a few steps and draws took.
        chains: bytes of the vectors of the chains, which count where they are more.
        losses: numbers in every array of losses.
        file: bytes of a cell's file.
    """
    draws, traces, largest = _SINGLE * sum(losses), _DOUBLE * sum(losses), max(losses, default=0)
    moving = max(chains, room.taken) + draws
    # The traces stand beside the draws that they are made of, and then beside what is written: their changes in the
    # precision of draws, made array by array of differences; and the file, beside the array that is compressed.
    closing = traces + draws + max(_DOUBLE * largest, file + _SINGLE * largest)
    return max(moving, room.held + closing)


def peak() -> float:
    """Most bytes that this process has held; 0 where the system does not tell."""
    if resource is None:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def resident() -> float:
    """Bytes that this process holds now; 0 where the system does not tell (elsewhere than on Linux)."""
    if resource is None or not _STATM.exists():
        return 0.0
    return float(_STATM.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
