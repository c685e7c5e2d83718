"""The states of a replay from its last to its first, in bounded memory: what is not kept is made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar

State = TypeVar("State")


def rewind(advance: Callable[[int, State], State], state: State, span: range, room: int) -> Iterator[tuple[int, State]]:
    """The steps of ``span``, the last first, each with the state before its update.

    States are kept where binomial checkpointing puts them, so that with s = room + 1 of them no update of up to
    C(s + r, s) is made more than r + 1 times (Griewank and Walther, ACM TOMS 26, 2000).

    Args:
        advance: ``advance(step, state)`` makes the update of a step.
        state: before the first update.
        span: the steps, consecutive.
        room: how many states may be kept beside the first; with all of them no update is made twice.

    Yields:
        ``(step, state)``; the caller may hold one of them, the one yielded.
    """
    if len(span) <= room + 1:
        states = [state]
        for step in span[:-1]:
            states.append(advance(step, states[-1]))
        for step in reversed(span):
            yield step, states.pop()
        return
    cut = span.start + _cut(len(span), room)
    later = state
    for step in range(span.start, cut):
        later = advance(step, later)
    yield from rewind(advance, later, range(cut, span.stop), max(room - 1, 0))
    del later
    yield from rewind(advance, state, range(span.start, cut), room)


def _cut(length: int, room: int) -> int:
    """After how many updates the next state is kept."""
    kept = room + 1
    repeats = next(r for r in count(1) if math.comb(kept + r, kept) >= length)
    return max(1, length - math.comb(kept - 1 + repeats, kept - 1))
