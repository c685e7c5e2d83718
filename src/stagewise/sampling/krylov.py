"""A function of a symmetric operator, of which only products are known, applied to vectors.

    function(A) x  ~  |x| V function(T) e_1,

V the vectors of Lanczos' recurrence from x, T their tridiagonal matrix. As good as the best polynomial of that degree,
and no reorthogonalisation is needed for it: what rounding does to the vectors it does to T alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.derivatives import Product
from stagewise.sampling.lanczos import recurrence

Function = Callable[[Tensor], Tensor]
"""Eigenvalues of any shape to those of the function, float64."""

# The steps in which an answer must have stopped changing; between them the small matrix is not looked at.
_EVERY = 4
_MOST = 1000
STORED = 2**22
"""Numbers in a step's vectors, up to which all steps are kept; beyond, the recurrence is run once more."""


def applied(function: Function, product: Product, rows: Tensor, tolerance: float) -> Tensor:
    """The function of the operator, applied to ``rows (row, size)``.

    Args:
        function: of the operator's eigenvalues.
        product: of the operator; the images may be changed in place.
        rows: none of them 0.
        tolerance: by how much four more products may change an answer, relative to its length.

    Raises:
        ValueError: a thousand products are not enough.
    """
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    kept: list[Tensor] = []
    weights = torch.zeros(len(rows), 0, dtype=torch.float64)
    for alpha, beta, vector in recurrence(product, rows):
        diagonal.append(alpha)
        if rows.numel() <= STORED:
            kept.append(vector)
        if len(diagonal) % _EVERY == 0:
            before, weights = weights, _weights(function, diagonal, beside)
            if _settled(before, weights, tolerance):
                break
        if len(diagonal) == _MOST:
            raise ValueError(
                f"{_MOST} products with the curvature do not tell what the updates of the window do with it; use a "
                "shorter window"
            )
        beside.append(beta)
    sides = (weights * rows.norm(dim=1).cpu().double()[:, None]).to(rows)
    vectors = kept or (vector for _, _, vector in recurrence(product, rows, (diagonal, beside)))
    result = torch.zeros_like(rows)
    for side, vector in zip(sides.T, vectors, strict=True):
        result.add_(side[:, None] * vector)
    return result


def _weights(function: Function, diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    """function(T) e_1 of every row ``(row, steps)``."""
    off = torch.stack(beside, 1)
    matrix = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    weights: Tensor = torch.linalg.vecdot(vectors, (function(values) * vectors[:, 0])[:, None])
    return weights


def _settled(before: Tensor, last: Tensor, tolerance: float) -> bool:
    """Whether the last answer is that before it, of all rows; their vectors are orthogonal, and of length 1."""
    change = last - pad(before, (0, last.shape[1] - before.shape[1]))
    return bool((change.norm(dim=1) <= tolerance * last.norm(dim=1)).all())
