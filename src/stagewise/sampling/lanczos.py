"""Lanczos' recurrence, and both ends of the spectrum of a symmetric operator with four vectors in memory.

The recurrence needs products and the last two of its vectors, and yields the coefficients of a small tridiagonal matrix
whose extreme eigenvalues become the operator's. Without the other vectors rounding lets converged eigenvalues appear
again, which leaves the extremes what they are. The eigenvector of the smallest one is a sum of all vectors: the
recurrence is run once more for it, with the coefficients known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from stagewise.ranks import ALONE, Alone

Coefficients = tuple[list[Tensor], list[Tensor]]
"""The diagonal of the tridiagonal matrix of every row ``(row,)``, and what is beside it; float64, on the CPU."""

Apply = Callable[[Tensor], Tensor]
"""Vectors ``(row, size)`` to their images, which may be changed in place."""

_LEAST, _SEED = 20, 20260


@dataclass(frozen=True)
class Ends:
    """Smallest and largest eigenvalue, and the direction of the smallest ``(size,)``, of length 1."""

    smallest: float
    largest: float
    softest: Tensor


def ends(
    apply: Apply,
    like: Tensor,
    tolerance: float,
    scale: float,
    most: int,
    start: Tensor | None = None,
    ranks: Alone = ALONE,
) -> Ends | None:
    """Both ends of the spectrum; None if they are not found by ``most`` products.

    Args:
        apply: the operator.
        like: a vector of its size, on its device and of its type.
        tolerance: the largest relative residual of either eigenvalue.
        scale: an eigenvalue smaller than that is found to the ``tolerance`` of this.
        most: products.
        start: where the recurrence begins ``(1, size)``; default a random vector that is always the same.
        ranks: the processes that hold the vectors.
    """
    start = _start(like) if start is None else start
    found = _tridiagonal(apply, start, tolerance, scale, most, ranks)
    if found is None:
        return None
    diagonal, beside = map(_numbers, found)
    values, vectors = eigh_tridiagonal(diagonal, beside)
    softest = torch.zeros_like(like)
    for weight, (_, _, vector) in zip(vectors[:, 0], recurrence(apply, start, found, ranks), strict=True):
        softest.add_(vector[0], alpha=float(weight))
    return Ends(float(values[0]), float(values[-1]), softest.div_(ranks.norm(softest)))


def _tridiagonal(
    apply: Apply, start: Tensor, tolerance: float, scale: float, most: int, ranks: Alone
) -> Coefficients | None:
    """As much of the matrix as shows both ends."""
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    least = min(_LEAST, int(ranks.total(torch.full((), start.shape[1], device=start.device))))
    for alpha, beta, _ in recurrence(apply, start, None, ranks):
        diagonal.append(alpha)
        values, vectors = eigh_tridiagonal(_numbers(diagonal), _numbers(beside))
        small = all(abs(beta * vectors[-1, end]) <= tolerance * max(scale, abs(values[end])) for end in (0, -1))
        # A residual is small near any eigenvalue, the extreme ones or not: the first few say little.
        if small and (len(diagonal) >= least or beta == 0):
            return diagonal, beside
        if len(diagonal) == most:
            break
        beside.append(beta)
    return None


def _start(like: Tensor) -> Tensor:
    return torch.randn(1, len(like), generator=torch.Generator().manual_seed(_SEED), dtype=like.dtype).to(like)


def _numbers(coefficients: list[Tensor]) -> list[float]:
    """Of the only row."""
    return [float(value) for value in coefficients]


def recurrence(
    apply: Apply, start: Tensor, known: Coefficients | None = None, ranks: Alone = ALONE
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Diagonal coefficients, those beside them and the vectors of every step; for as many steps as they are known.

    Every row of ``start (row, size)`` has a recurrence of its own. One that has seen all it can goes on with zeros.
    """
    vector = start / ranks.norm(start)[:, None].to(start)
    del start  # of large models every copy counts
    before, beta = torch.zeros_like(vector), torch.zeros_like(vector[:, :1])
    for step in count():
        if known and step == len(known[1]):
            yield known[0][step], torch.zeros_like(known[0][step]), vector
            return
        image = apply(vector)
        own = ranks.dot(image, vector).cpu().double()
        alpha = known[0][step] if known else own
        image.addcmul_(vector, alpha.to(image)[:, None], value=-1).addcmul_(before, beta, value=-1)
        after = known[1][step] if known else ranks.norm(image).cpu().double()
        yield alpha, after, vector
        beta = after.to(image)[:, None]
        before, vector = vector, image.div_(torch.where(beta > 0, beta, torch.inf))
