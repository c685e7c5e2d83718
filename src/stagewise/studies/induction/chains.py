"""The data: sequences that are each a Markov chain of its own, so that its rule must be learnt from the context."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Drawn sequences, and what they were drawn from.

    Attributes:
        tokens: ``(n, length)``, int64, from 0 to vocabulary - 1.
        matrices: ``(n, vocabulary, vocabulary)``, float64: probability of the next token (last axis) after a token.
    """

    tokens: Tensor
    matrices: Tensor


def draw(n: int, length: int, vocabulary: int, generator: torch.Generator) -> Sequences:
    """Draw ``n`` chains, each with its own transition matrix.

    The rows of a matrix are independent and Dirichlet(1), that is uniform among all distributions. The first token is
    uniform, not stationary: a stationary one would say something of the matrix, and counting would not be exact.

    Raises:
        ValueError: a size is not positive, or there is only one token.
    """
    if n < 1 or length < 1 or vocabulary < 2:
        raise ValueError(f"need n >= 1, length >= 1 and vocabulary >= 2, got {n}, {length} and {vocabulary}")
    # Independent exponentials, divided by their sum, are Dirichlet(1).
    matrices = torch.empty(n, vocabulary, vocabulary, dtype=torch.float64).exponential_(generator=generator)
    matrices /= matrices.sum(-1, keepdim=True)
    steps, every = matrices.cumsum(-1), torch.arange(n)
    tokens = torch.empty(n, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocabulary, (n,), generator=generator)
    for place, level in enumerate(torch.rand(length - 1, n, 1, dtype=torch.float64, generator=generator), start=1):
        below = level >= steps[every, tokens[:, place - 1]]
        tokens[:, place] = below.sum(-1).clamp(max=vocabulary - 1)  # the last step may be rounded to less than 1
    return Sequences(tokens, matrices)
