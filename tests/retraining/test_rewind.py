import math
from collections import Counter

import pytest

from stagewise.retraining.rewind import rewind


def walked(length, room, first=7):
    """Steps and states of a rewind whose state is the number of updates made, how often each was made, and most held.

    A state that is dropped leaves ``held`` at once: CPython counts references.
    """
    made, held, most = Counter(), set(), [0]

    class State:
        def __init__(self, number):
            self.number = number
            held.add(id(self))
            most[0] = max(most[0], len(held))

        def __del__(self):
            held.discard(id(self))

    def advance(step, state):
        assert step == state.number
        made[step] += 1
        return State(step + 1)

    seen = []
    for step, state in rewind(advance, lambda: State(first), range(first, first + length), room):
        assert state.number == step
        seen.append(step)
        del state
    return seen, made, most[0]


@pytest.mark.parametrize("room", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 31])
def test_every_step_comes_once_from_last_to_first_with_its_own_state(length, room):
    seen, _, _ = walked(length, room)
    assert seen == list(range(7 + length - 1, 6, -1))


def test_no_step_is_no_state():
    assert walked(0, 3)[0] == []


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [5, 31, 100])
def test_states_held_are_as_many_as_there_is_room_for_and_updates_as_few_as_that_allows(length, room):
    _, made, most = walked(length, room)
    assert most <= room + 2  # the one that is made and the one it is made of
    kept = room + 1
    repeats = next(r for r in range(1, length) if math.comb(kept + r, kept) >= length)
    assert max(made.values()) <= repeats
    if room >= length - 1:
        assert set(made.values()) == {1}


def test_a_long_span_needs_no_deep_recursion():
    seen, _, _ = walked(5000, 5000)
    assert len(seen) == 5000
