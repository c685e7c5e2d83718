"""Exact predictors by counting in the context, from the simplest to the best there is.

All are log probabilities ``(n, length - 1, vocabulary)``, float64, of the tokens 1 to length - 1, each given those
before it: entry ``s - 1`` predicts token s. Each rule is the exact Bayes predictor of some data under a uniform prior:
the uniform rule where nothing can be learnt, the unigram rule where tokens are independent draws from one unknown
distribution, the bigram rule where they are a Markov chain with unknown matrix, as they are here: no predictor has a
smaller expected loss on them than the bigram rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stagewise.studies.measures import divergence

Rule = Callable[[Tensor, int], Tensor]
"""Tokens ``(n, length)`` and the size of the vocabulary to log probabilities ``(n, length - 1, vocabulary)``."""


def uniform(tokens: Tensor, vocabulary: int) -> Tensor:
    """Every token alike, whatever was seen."""
    n, length = tokens.shape
    return smoothed(torch.zeros(n, length - 1, vocabulary, dtype=torch.float64))


def unigram(tokens: Tensor, vocabulary: int) -> Tensor:
    """By how often each token was seen: (1 + count) / (vocabulary + tokens seen)."""
    return smoothed(functional.one_hot(tokens[:, :-1], vocabulary).cumsum(1))


def bigram(tokens: Tensor, vocabulary: int) -> Tensor:
    """By how often each token was seen after the current one u: (1 + count of u v) / (vocabulary + count of u)."""
    return smoothed(followers(tokens, vocabulary))


RULES: dict[str, Rule] = {"uniform": uniform, "unigram": unigram, "bigram": bigram}
"""By name, in the order in which a network learns them."""


def followers(tokens: Tensor, vocabulary: int) -> Tensor:
    """How often each token has followed the current one so far, ``(n, length - 1, vocabulary)``, int64.

    Entry ``s - 1`` counts, for the current token u at s - 1, the pairs u v that lie wholly before token s.
    """
    n, length = tokens.shape
    pairs, every = torch.zeros(n, vocabulary, vocabulary, dtype=torch.int64), torch.arange(n)
    counts = torch.empty(n, length - 1, vocabulary, dtype=torch.int64)
    for place in range(length - 1):
        current, following = tokens[:, place], tokens[:, place + 1]
        counts[:, place] = pairs[every, current]
        pairs[every, current, following] += 1
    return counts


def smoothed(counts: Tensor) -> Tensor:
    """Log of (1 + count) / (vocabulary + sum of counts): the mean of a Dirichlet(1) distribution after the counts."""
    weights = 1 + counts.double()
    return weights.log() - weights.sum(-1, keepdim=True).log()


def gain(tokens: Tensor, vocabulary: int) -> Tensor:
    """What is expected to be gained over the unigram rule by knowing the current token: ``(n, length - 1)``, nats.

    KL(bigram || unigram). Since the bigram rule is exact, it is the mean over what may come next, given the context, of
    the difference of the two losses: the tokens that learning induction is about are those where it is large.
    """
    return divergence(bigram(tokens, vocabulary), unigram(tokens, vocabulary))


def log_ratio(tokens: Tensor, vocabulary: int) -> Tensor:
    """What was gained by it on the token that came: log bigram - log unigram ``(n, length - 1)``, nats."""
    difference = bigram(tokens, vocabulary) - unigram(tokens, vocabulary)
    return difference.gather(-1, tokens[:, 1:, None])[..., 0]
