"""Draws are what was added to them, whatever the blocks they lie in."""

import pytest
import torch

from stagewise.sampling.draws import Draws


def filled(looks, count):
    draws = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(k)) for k in range(count)]
    kept = Draws(looks)
    for draw in draws:
        kept.add(draw)
    return kept, draws


@pytest.mark.parametrize("looks", [(), (7,), (2, 4, 8), (20,)])
def test_every_kind_is_the_draws_in_order_beside_the_anchor(looks):
    kept, draws = filled(looks, 7)
    anchor = torch.randn(4, dtype=torch.float64)
    for index in (0, 1, -1):
        expected = torch.stack([draw[index] for draw in draws], 1) + anchor
        assert torch.equal(kept.kind(index, anchor), expected)
        assert kept.kind(index, anchor).is_contiguous()


def test_what_is_taken_up_goes_on_to_the_same_draws():
    whole, draws = filled((4, 8), 7)
    first, _ = filled((4, 8), 3)
    again = Draws((4, 8))
    again.go_on(first.state())
    for draw in draws[3:]:
        again.add(draw)
    assert torch.equal(again.state(), whole.state())
    nothing = Draws((4, 8))
    nothing.go_on(Draws((4,)).state())
    assert len(nothing.state()) == 0


def test_room_is_made_a_look_at_a_time():
    """A block for every draw would leave the heap in holes; one for the longest chains would be gigabytes unused."""
    kept, _ = filled((4, 64, 1024), 5)
    assert [len(block) for block in kept._blocks] == [4, 60]
