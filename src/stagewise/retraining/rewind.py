"""The states of a replay from its last to its first, in bounded memory: what is not kept is made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar

State = TypeVar("State")
Keep = Callable[[State], Callable[[], State]]
"""From a state to what gives it back."""


def in_memory(state: State) -> Callable[[], State]:
    """Keep a state as it is."""
    return lambda: state


def rewind(
    advance: Callable[[int, State], State],
    begin: Callable[[], State],
    span: range,
    room: int,
    keep: Keep[State] = in_memory,
) -> Iterator[tuple[int, State]]:
    """The steps of ``span``, the last first, each with the state before its update.

    States are kept where binomial checkpointing puts them, so that with s = room + 1 of them no update of up to
    C(s + r, s) is made more than r + 1 times (Griewank and Walther, ACM TOMS 26, 2000).

    Args:
        advance: ``advance(step, state)`` makes the update of a step.
        begin: makes the state before the first update; called anew whenever it is needed.
        span: the steps, consecutive.
        room: how many states may be kept beside the one in use; with all of them no update is made twice.
        keep: how they are kept.

    Yields:
        ``(step, state)``; the caller may hold one of them, the one yielded.
    """
    if len(span) <= room + 1:
        kept, state = [], begin()
        for step in span[:-1]:
            kept.append(keep(state))
            state = advance(step, state)
        if span:
            yield span[-1], state
        del state
        for step in reversed(span[:-1]):
            yield step, kept.pop()()
        return
    cut = span.start + _cut(len(span), room)
    middle = [keep(_advanced(advance, begin(), range(span.start, cut)))]
    yield from rewind(advance, lambda: middle[0](), range(cut, span.stop), max(room - 1, 0), keep)
    middle.clear()
    yield from rewind(advance, begin, range(span.start, cut), room, keep)


def _advanced(advance: Callable[[int, State], State], state: State, span: range) -> State:
    for step in span:
        state = advance(step, state)
    return state


def _cut(length: int, room: int) -> int:
    """After how many updates the next state is kept."""
    kept = room + 1
    repeats = next(r for r in count(1) if math.comb(kept + r, kept) >= length)
    return max(1, length - math.comb(kept - 1 + repeats, kept - 1))
