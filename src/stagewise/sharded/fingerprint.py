"""By what the checkpoint of a sharded model is known: the same number however its rows are divided, without gathering.

Every entry is mixed with its place in the whole tensor, and the results are added modulo 2^64, in whatever order.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.in_place import InPlaceModel
from stagewise.piece import Piece

_PIECE = 2**20
_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd multipliers of splitmix64.
_INDEX, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def fingerprint(model: InPlaceModel, fitted: Checkpoint) -> str:
    """Hash of all that can change a number computed at this checkpoint, but for what comes after it."""
    kinds = {"params": fitted.params, "first": fitted.first_moment, "second": fitted.second_moment}
    sums, facts = [], [repr((fitted.step, fitted.optimizer, sorted(fitted.update_counts.items())))]
    for kind, tensors in kinds.items():
        for name in sorted(tensors):
            tensor, piece = tensors[name], model.pieces.get(name)
            if piece is None:  # a buffer, which every process has
                piece = Piece(tuple(tensor.shape), 0, len(tensor) if tensor.ndim else 1)
                tensor = tensor if model.ranks.index == 0 else tensor.reshape(-1)[:0]
            facts.append(f"{kind}/{name} {tensor.dtype} {piece.shape}")
            sums.append(_mixed(tensor, piece).to(next(iter(model.state.values())).device))
    total = model.ranks.total(torch.stack(sums)).tolist()
    return hashlib.sha256(repr((facts, total)).encode()).hexdigest()


def _mixed(tensor: Tensor, piece: Piece) -> Tensor:
    """The sum over the entries that are here."""
    flat, total = tensor.detach().reshape(-1), torch.zeros((), dtype=torch.int64, device=tensor.device)
    inner = math.prod(piece.shape[piece.axis + 1 :])
    here, whole = max(1, piece.size * inner), max(1, math.prod(piece.shape[piece.axis :]))
    for first in range(0, len(flat), _PIECE):
        part = flat[first : first + _PIECE]
        number = torch.arange(first, first + len(part), device=part.device)
        place = number // here * whole + piece.start * inner + number % here
        bits = part.view(_TYPES[part.element_size()]) if part.dtype != torch.bool else part
        mixed = (bits.long() + 1) ^ (place + 1) * _INDEX
        mixed = (mixed ^ (mixed >> 30)) * _FIRST
        mixed = (mixed ^ (mixed >> 27)) * _SECOND
        total += (mixed ^ (mixed >> 31)).sum()
    return total
