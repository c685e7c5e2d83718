"""The simplest predictors of text, by counts in the training set: how often each token comes, and after which one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR = 8.0
"""Tokens that the bigram rule has seen, as it were, before it counts: drawn by the unigram rule."""


@dataclass(frozen=True, eq=False)
class NGrams:
    """Log probabilities of the next token.

    Attributes:
        unigram: ``(vocabulary,)``: (1 + count of v) / (vocabulary + count of all).
        bigram: ``(vocabulary, vocabulary)``, of v after u: (PRIOR unigram(v) + count of u v) / (PRIOR + count of u).
    """

    unigram: Tensor
    bigram: Tensor

    @classmethod
    def of(cls, sequences: Tensor, vocabulary: int) -> NGrams:
        """Counted in sequences ``(n, length)``, within each."""
        pairs = sequences[:, :-1] * vocabulary + sequences[:, 1:]
        counts = torch.bincount(pairs.flatten(), minlength=vocabulary**2).view(vocabulary, vocabulary).double()
        single = 1 + torch.bincount(sequences.flatten(), minlength=vocabulary).double()
        unigram = single / single.sum()
        bigram = (PRIOR * unigram + counts) / (PRIOR + counts.sum(1, keepdim=True))
        return cls(unigram.log().float(), bigram.log().float())

    def log_probabilities(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of both rules for the predicted tokens of ``(n, length)``: ``(n, length - 1, vocabulary)``, by name."""
        inputs = tokens[:, :-1]
        return {"unigram": self.unigram.expand(*inputs.shape, -1), "bigram": self.bigram[inputs]}
