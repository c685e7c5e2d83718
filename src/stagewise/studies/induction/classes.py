"""What kind of token each predicted one is, by what the exact rules say of it; no network is asked.

A network leaves the unigram plateau by learning to weigh what has followed the current token. For a single token that
can help, hurt, change nothing, or not be possible yet, and each token belongs to exactly one of these:

* ``early``: the current token has not been followed by any so far, so that there is nothing to copy from.
* ``neither``: it has, but both rules expect about the same: KL(bigram || unigram) is below the threshold.
* ``induction``: they differ, and what came is what the bigram rule made more likely.
* ``against``: they differ, and what came is what it made less likely (or as likely).

``early`` comes first: there too the rules differ, but by what the unigram rule has counted of other tokens, and no head
that looks for an earlier occurrence finds one. ``induction`` and ``against`` are told apart by nothing but which token
came: their contexts are alike. One rewards what the other punishes, so that their influences oppose and nearly cancel
once the network weighs contexts rightly. What is left is what it learns, and the expected loss shows it.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from stagewise.studies.chance import Labels
from stagewise.studies.induction.rules import followers, gain, log_ratio

CLASSES = ("induction", "against", "neither", "early")

THRESHOLD = 0.05
"""Nats. About half of the mean gain in sequences of 100 of three tokens: below it there is little to be learnt."""

THIRDS = ("first", "middle", "last")
"""Of a sequence."""


def token_classes(tokens: Tensor, vocabulary: int, threshold: float = THRESHOLD) -> Labels:
    """The class of every predicted token ``(n, length - 1)``: entry ``s - 1`` is that of token s."""
    early = followers(tokens, vocabulary).sum(-1).numpy() == 0
    alike = gain(tokens, vocabulary).numpy() < threshold
    helped = log_ratio(tokens, vocabulary).numpy() > 0
    return np.select([early, alike, helped], ["early", "neither", "induction"], "against")


def by_third(classes: Labels) -> Labels:
    """Class and third of the sequence of every predicted token ``(n, length - 1)``: ``"induction last"``."""
    length = classes.shape[1]
    return np.char.add(np.char.add(classes, " "), np.array(THIRDS)[np.arange(length) * 3 // length])
