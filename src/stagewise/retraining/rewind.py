"""The states of a replay from its last to its first, in bounded memory: what is not kept is made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar

State = TypeVar("State")


def rewind(
    advance: Callable[[int, State], State], begin: Callable[[], State], span: range, room: int
) -> Iterator[tuple[int, State]]:
    """The steps of ``span``, the last first, each with the state before its update.

    States are kept where binomial checkpointing puts them, so that with s = room + 1 of them no update of up to
    C(s + r, s) is made more than r + 1 times (Griewank and Walther, ACM TOMS 26, 2000).

    Args:
        advance: ``advance(step, state)`` makes the update of a step.
        begin: makes the state before the first update; called anew whenever it is needed.
        span: the steps, consecutive.
        room: how many states may be kept beside the one in use; with all of them no update is made twice.

    Yields:
        ``(step, state)``; the caller may hold one of them, the one yielded.
    """
    if len(span) <= room + 1:
        states = [begin()]
        for step in span[:-1]:
            states.append(advance(step, states[-1]))
        for step in reversed(span):
            yield step, states.pop()
        return
    cut = span.start + _cut(len(span), room)
    kept = [_advanced(advance, begin(), range(span.start, cut))]
    yield from rewind(advance, lambda: kept[0], range(cut, span.stop), max(room - 1, 0))
    kept.clear()
    yield from rewind(advance, begin, range(span.start, cut), room)


def _advanced(advance: Callable[[int, State], State], state: State, span: range) -> State:
    for step in span:
        state = advance(step, state)
    return state


def _cut(length: int, room: int) -> int:
    """After how many updates the next state is kept."""
    kept = room + 1
    repeats = next(r for r in count(1) if math.comb(kept + r, kept) >= length)
    return max(1, length - math.comb(kept - 1 + repeats, kept - 1))
