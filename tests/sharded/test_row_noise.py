"""Noise by blocks of rows: the same bits however the rows are divided, and independent otherwise."""

import math

import pytest
import torch

from stagewise.piece import Piece
from stagewise.sampling.row_noise import RowNoise, rows_per_block

SHAPES = {
    "many blocks": (700, 1000),
    "fewer rows than processes": (2, 5),
    "uneven": (11, 6),
    "bias": (5,),
    "four axes": (6, 2, 3, 4),
}


def pieces(index, count, axis=0):
    return {name: Piece.held(shape, index, count, axis) for name, shape in SHAPES.items() if len(shape) > axis}


def drawn(held, key="0/0/noise", chains=2, rows=2, dtype=torch.float32):
    length = sum(math.prod(piece.own) for piece in held.values())
    flat = RowNoise(held, key, chains).normal(torch.empty(rows, length, dtype=dtype))
    parts = torch.split(flat, [math.prod(piece.own) for piece in held.values()], -1)
    return {name: part.reshape(rows, *held[name].own) for name, part in zip(held, parts, strict=True)}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_what_processes_draw_for_their_rows_is_what_one_draws_for_all(count, axis):
    whole, parts = drawn(pieces(0, 1, axis)), [drawn(pieces(k, count, axis)) for k in range(count)]
    for name in whole:
        assert torch.equal(torch.cat([part[name] for part in parts], 1 + axis), whole[name])


def test_processes_do_not_draw_the_same_numbers():
    first, second = (drawn(pieces(k, 2)) for k in range(2))
    for name in ("many blocks", "four axes"):
        assert not torch.isclose(first[name], second[name]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_block_chain_use_and_seed_has_noise_of_its_own_and_it_is_standard_normal(dtype):
    held, name = pieces(0, 1), "many blocks"
    of_keys = [
        drawn(held, key, rows=4, dtype=dtype)[name] for key in ("0/0/noise", "1/0/noise", "0/1/noise", "0/0/pilot")
    ]
    blocks = torch.stack(of_keys).reshape(-1, 700 // 7, 1000)
    assert rows_per_block(SHAPES[name]) == 262
    flat = blocks.flatten(1)[:, :50_000].double()
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / 50_000**0.5
    assert abs(flat.mean()) < 5 / flat.numel() ** 0.5
    assert abs(flat.var() - 1) < 5 * (2 / flat.numel()) ** 0.5


def test_chains_one_by_one_have_the_noise_they_have_together_and_after_a_stop():
    held = pieces(1, 2)
    length = sum(math.prod(piece.own) for piece in held.values())
    together = RowNoise(held, "key", 2).normal(torch.empty(4, length))
    source = RowNoise(held, "key", 2)
    first = source.normal(torch.empty(3, length))
    again = RowNoise(held, "key", 2)
    again.set_state(source.get_state())
    assert torch.equal(torch.cat([first, again.normal(torch.empty(1, length))]), together)
