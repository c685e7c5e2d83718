"""Where the chains of a block have their noise from."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator

from stagewise.evaluate import Point
from stagewise.in_place import InPlaceModel
from stagewise.sampling.base import Source
from stagewise.sampling.row_noise import RowNoise


def generator(seed: int, block: int, use: str, device: torch.device) -> Generator:
    """Independent streams for every (seed, block, use): hashed, so that neighbours share nothing."""
    digest = hashlib.sha256(f"{seed}/{block}/{use}".encode()).digest()
    # Minibatches are indices on the CPU; noise is drawn where the chains are.
    on = torch.device("cpu") if "batch" in use else device
    return Generator(on).manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def noise_source(point: Point, seed: int, block: int, use: str, chains: int) -> Source:
    """The noise of ``chains`` chains: one stream, or of a model that several processes may hold by blocks of rows."""
    if isinstance(model := point.task.pure, InPlaceModel):
        pieces = {name: model.pieces[name] for name in point.vector.names}
        return RowNoise(pieces, f"{seed}/{block}/{use}", chains)
    return generator(seed, block, use, point.task.device)
