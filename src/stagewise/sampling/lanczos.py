"""Both ends of the spectrum of a symmetric operator, of which only products are known, with four vectors in memory.

Lanczos' recurrence needs the last two of its vectors, and yields the coefficients of a small tridiagonal matrix whose
extreme eigenvalues become the operator's. Without the other vectors rounding lets converged eigenvalues appear again,
which leaves the extremes what they are. The eigenvector of the smallest one is a sum of all vectors: the recurrence is
run once more for it, with the coefficients known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

_Coefficients = tuple[list[float], list[float]]
"""The diagonal of the tridiagonal matrix, and what is beside it."""

Apply = Callable[[Tensor], Tensor]
"""A vector ``(size,)`` to its image, which may be changed in place."""


_LEAST, _SEED = 20, 20260


@dataclass(frozen=True)
class Ends:
    """Smallest and largest eigenvalue, and the direction of the smallest ``(size,)``, of length 1."""

    smallest: float
    largest: float
    softest: Tensor


def ends(apply: Apply, like: Tensor, tolerance: float, scale: float, most: int) -> Ends | None:
    """Both ends of the spectrum; None if they are not found by ``most`` products.

    Args:
        apply: the operator.
        like: a vector of its size, on its device and of its type.
        tolerance: the largest relative residual of either eigenvalue.
        scale: an eigenvalue smaller than that is found to the ``tolerance`` of this.
        most: products.
    """
    found = _tridiagonal(apply, like, tolerance, scale, most)
    if found is None:
        return None
    values, vectors = eigh_tridiagonal(*found)
    softest = torch.zeros_like(like)
    for weight, (_, _, vector) in zip(vectors[:, 0], _recurrence(apply, like, found), strict=True):
        softest.add_(vector, alpha=float(weight))
    return Ends(float(values[0]), float(values[-1]), softest.div_(softest.norm()))


def _tridiagonal(apply: Apply, like: Tensor, tolerance: float, scale: float, most: int) -> _Coefficients | None:
    """As much of the matrix as shows both ends."""
    diagonal: list[float] = []
    beside: list[float] = []
    for alpha, beta, _ in _recurrence(apply, like):
        diagonal.append(alpha)
        values, vectors = eigh_tridiagonal(diagonal, beside)
        small = all(abs(beta * vectors[-1, end]) <= tolerance * max(scale, abs(values[end])) for end in (0, -1))
        # A residual is small near any eigenvalue, the extreme ones or not: the first few say little.
        if small and (len(diagonal) >= min(_LEAST, len(like)) or beta == 0):
            return diagonal, beside
        if len(diagonal) == most:
            break
        beside.append(beta)
    return None


def _recurrence(
    apply: Apply, like: Tensor, known: _Coefficients | None = None
) -> Iterator[tuple[float, float, Tensor]]:
    """Diagonal coefficient, the one beside it and the vector of every step; for as many steps as they are known."""
    vector = torch.randn(len(like), generator=torch.Generator().manual_seed(_SEED), dtype=like.dtype).to(like)
    vector.div_(vector.norm())
    before, beta = torch.zeros_like(vector), 0.0
    for step in count():
        if known and step == len(known[1]):
            yield known[0][step], 0.0, vector
            return
        image = apply(vector)
        alpha = known[0][step] if known else float(image @ vector)
        image.add_(vector, alpha=-alpha).add_(before, alpha=-beta)
        beta = known[1][step] if known else float(image.norm())
        yield alpha, beta, vector
        before, vector = vector, image.div_(beta)
