"""What kind of token each predicted one is: by what it looks like, and by whether its pair was there before.

Kinds are those of :func:`stagewise.token_kinds`, and two more:

* ``keyword``: a keyword of Python, whole.
* ``first occurrence``: v in u v, where the same u v comes again later as an ``induction pattern``, and this is the
  first. Both have the same pairs, and differ only in whether the context has shown them: what the one does that the
  other does not, is not done by which words they are.

A token that is of several kinds belongs to the first of :data:`CLASSES`, and one of none to no class.
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stagewise.labels import NONE
from stagewise.studies.chance import Labels
from stagewise.text import token_kinds

INDUCTION, FIRST = "induction pattern", "first occurrence"

CLASSES = (
    INDUCTION,
    FIRST,
    "keyword",
    "left delimiter",
    "right delimiter",
    "formatting",
    "word start",
    "word part",
    "word end",
)

_KEYWORDS = frozenset(keyword.kwlist)


def token_classes(sequences: Tensor, words: Sequence[str], reference: Tensor) -> Labels:
    """The class of every predicted token ``(n, length - 1)``: entry ``s - 1`` is that of token s.

    Args:
        sequences: tokens ``(n, length)``.
        words: the text of every token.
        reference: sequences in which it is counted how often a token follows another.
    """
    rows = sequences.tolist()
    kinds = token_kinds(rows, words.__getitem__, reference=reference.tolist())
    kinds |= {"keyword": _keywords(rows, words), FIRST: _first(rows, kinds[INDUCTION])}
    return np.select([kinds[name] for name in CLASSES], CLASSES, NONE)


def _keywords(rows: Sequence[Sequence[int]], words: Sequence[str]) -> NDArray[np.bool_]:
    """Which predicted tokens are keywords of Python that neither a letter, a digit nor an underscore follows."""
    whole = np.array([word.strip() in _KEYWORDS for word in words])
    goes_on = np.array([word[:1].isalnum() or word[:1] == "_" for word in words])
    tokens = np.array(rows)
    found: NDArray[np.bool_] = whole[tokens[:, 1:]]
    found[:, :-1] &= ~goes_on[tokens[:, 2:]]
    return found


def _first(rows: Sequence[Sequence[int]], repeated: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which predicted tokens end the first occurrence of a pair that is ``repeated`` later in its sequence."""
    found = np.zeros_like(repeated)
    for row, again, first in zip(rows, repeated, found, strict=True):
        pairs = list(pairwise(row))
        wanted = {pairs[place] for place in np.flatnonzero(again)}
        for place, pair in enumerate(pairs):
            if pair in wanted:
                first[place] = True
                wanted.discard(pair)
    return found
