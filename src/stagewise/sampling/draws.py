"""The draws of one data set, in blocks that are made once for many of them.

A tensor of its own for every draw would lie in the heap between what a step needs for a moment, and keep the holes that
this leaves from being given back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Numbers of every draw, float32 on the CPU.

    Args:
        looks: numbers of draws up to which there is to be room, ascending; beyond the last, room is made one by one.
    """

    def __init__(self, looks: Sequence[int]) -> None:
        self._looks, self._blocks, self._count = looks, list[Tensor](), 0

    def add(self, draw: Tensor) -> None:
        """Keep one more."""
        room = sum(len(block) for block in self._blocks)
        if self._count == room:
            more = next((look for look in self._looks if look > room), room + 1) - room
            self._blocks.append(torch.empty(more, *draw.shape))
            room += more
        self._blocks[-1][self._count - room] = draw
        self._count += 1

    def state(self) -> Tensor:
        """All of them ``(draw, ...)``."""
        return torch.cat(self._blocks)[: self._count] if self._blocks else torch.empty(0)

    def go_on(self, kept: Sequence[Tensor] | Tensor) -> None:
        """Take up what :meth:`state` gave."""
        for draw in kept:
            self.add(draw)

    def kind(self, index: int, anchor: Tensor) -> Tensor:
        """What stands at ``index`` of every draw, added to the anchor: ``(chain, draw, ...)``, float64."""
        chains = self._blocks[0].shape[2]
        sums, start = torch.empty(chains, self._count, *anchor.shape, dtype=anchor.dtype), 0
        for block in self._blocks:
            drawn = block[: self._count - start, index].transpose(0, 1)
            torch.add(drawn, anchor, out=sums[:, start : start + drawn.shape[1]])
            start += len(block)
        return sums
