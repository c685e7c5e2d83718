"""Noise of a model that several processes hold: the same bits however many there are.

Every block of rows of a parameter has a generator of its own, seeded by a hash of seed, block of chains, use, chain,
number of the draw, parameter and block of rows. How many rows a block has depends on the parameter's shape alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from stagewise.piece import Piece

_NUMBERS = 2**18  # in a block of rows: few generators, and little that is drawn for the rows of others


class RowNoise:
    """Standard normal numbers for the rows that are here.

    Args:
        pieces: the part of every parameter that is here, by name, in the order of the vector.
        key: what it is for: seed, block of chains and use.
        chains: how many chains there are; they come in their order, all or a few at a time.
    """

    def __init__(self, pieces: Mapping[str, Piece], key: str, chains: int) -> None:
        self._pieces, self._key, self._chains, self._drawn = pieces, key, chains, 0

    def normal(self, like: Tensor) -> Tensor:
        """Noise for the next chains, of the shape, type and device of ``like (chain, parameters)``."""
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        for row in noise:
            number, chain = divmod(self._drawn, self._chains)
            parts = torch.split(row, [math.prod(piece.own) for piece in self._pieces.values()])
            for (name, piece), part in zip(self._pieces.items(), parts, strict=True):
                _fill(part.view(piece.own or (1,)), piece, f"{self._key}/{chain}/{number}/{name}")
            self._drawn += 1
        return noise

    def get_state(self) -> Tensor:
        """How many vectors were drawn."""
        return torch.tensor(self._drawn)

    def set_state(self, state: Tensor) -> None:
        """Go on from there."""
        self._drawn = int(state)


def rows_per_block(shape: tuple[int, ...]) -> int:
    """How many rows of a parameter of this shape have one generator."""
    return max(1, _NUMBERS // max(1, math.prod(shape[1:])))


def _fill(part: Tensor, piece: Piece, key: str) -> None:
    """The noise of a part of one parameter."""
    if not part.numel():
        return
    shape = piece.shape or (1,)
    by_rows, rows = piece.axis == 0, rows_per_block(shape)
    first, last = (piece.start, piece.start + piece.size) if by_rows else (0, shape[0])
    for block in range(first // rows, -(-last // rows)):
        start, stop = block * rows, min((block + 1) * rows, shape[0])
        drawn = torch.randn(
            stop - start, *shape[1:], generator=_generator(f"{key}/{block}", part), dtype=part.dtype, device=part.device
        )
        here, there = max(start, first), min(stop, last)
        drawn = drawn[here - start : there - start]
        part[here - first : there - first] = drawn if by_rows else drawn.narrow(piece.axis, piece.start, piece.size)


def _generator(key: str, like: Tensor) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
