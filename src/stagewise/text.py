"""Kinds of tokens in text, as groups of what a language model learns: by what a token looks like, and where it stands.

A model that predicts the next token has no loss for the first, so that labels are those of the tokens 1, 2, ...: what
is labelled is the token that is *predicted*, as its loss is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stagewise.labels import NONE

Members = dict[str, NDArray[np.bool_]]

RARE = 0.05
"""Most often that a token may follow another for their repetition to tell of this context, and not of the language."""

_WORD_START = re.compile(r" [^\W\d_]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r" ?[0-9]+")
_OPENING = re.compile(r"""[^\w\s]*(?:[(\[{<]|``|“)["']*""")
_CLOSING = re.compile(r"""["']*(?:[)\]}>]|''|”)[^\w\s]*""")
_MARKS = {"#", "*", "|", "--", "---", "...", "\\", "=", "**", "##", "###", "//"}

EXCLUSIVE = (
    "induction pattern",
    "left delimiter",
    "right delimiter",
    "numeric",
    "formatting",
    "spacing",
    "word start",
    "word part",
    "word end",
)
"""In which order :func:`token_labels` looks for the one label of a token: what is rarer comes first."""


def token_kinds(
    sequences: Sequence[Sequence[int]],
    decode: Callable[[int], str],
    *,
    reference: Sequence[Sequence[int]] | None = None,
) -> Members:
    r"""Which kinds every predicted token is of; a token may be of several, or of none.

    * ``word start``: a space and letters; ``word part``: letters that go on in the next token; ``word end``: letters
      that do not. A word without a space before it, as at the beginning of a line, is one of the last two.
    * ``left delimiter``: ends with an opening bracket or quotation mark; ``right delimiter``: begins with a closing
      one. Straight quotation marks are neither, alone.
    * ``numeric``: digits. ``formatting``: line breaks, tabs, signs of markup. ``spacing``: white space only.
    * ``induction pattern``: v in  ... u v ... u v: the pair was there before in this sequence, without overlap, and v
      follows u at most one time in twenty in the reference, so that only this context tells. Not of white space alone.

    Args:
        sequences: the tokens of every sequence; lengths may differ.
        decode: the text of one token, e.g. ``lambda token: tokenizer.decode([token])``.
        reference: where it is counted how often a token follows another; default ``sequences``.

    Returns:
        By kind, which tokens are of it ``(sequence, longest - 1)``: entry t is of token t + 1, as its loss is.

    Raises:
        ValueError: there is no sequence of two tokens or more.

    Example:
        >>> texts = {0: "(", 1: " dog", 2: "s", 3: ")", 4: "\n"}
        >>> kinds = sw.token_kinds([[0, 1, 2, 3, 4]], texts.__getitem__)
        >>> [name for name, members in kinds.items() if members[0, 2]], kinds["word end"].tolist()
        (['right delimiter'], [[False, True, False, False]])
    """
    rows = [[int(token) for token in sequence] for sequence in sequences]
    longest = max((len(row) for row in rows), default=0)
    if longest < 2:
        raise ValueError("expected a sequence of two tokens or more: the first is not predicted")
    texts = {token: decode(token) for row in rows for token in set(row)}
    follows = _Follows(rows if reference is None else reference)
    members = {kind: np.zeros((len(rows), longest - 1), dtype=bool) for kind in EXCLUSIVE}
    for number, row in enumerate(rows):
        words = [texts[token] for token in row]
        repeated = _repeated(row)
        for place in range(1, len(row)):
            goes_on = bool(_LETTERS.match(words[place + 1])) if place + 1 < len(row) else None
            found = _looks(words[place], goes_on)
            blank = not (words[place - 1] + words[place]).strip()
            if repeated[place] and not blank and follows.share(row[place - 1], row[place]) <= RARE:
                found.append("induction pattern")
            for kind in found:
                members[kind][number, place - 1] = True
    return members


def token_labels(kinds: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.str_]:
    """One label for every predicted token, as ``train_groups`` and ``query_groups`` of a task take them.

    Args:
        kinds: members of every kind, as :func:`token_kinds` gives them, perhaps with some of one's own or without some.

    Returns:
        ``(sequence, token)``, the first of :data:`EXCLUSIVE` that a token is of, else of the others in their order; of
        none, "", which is in no group.

    Example:
        >>> kinds = {"spacing": np.array([[True, False, False]]), "first": np.array([[True, True, False]])}
        >>> sw.token_labels(kinds).tolist()
        [['spacing', 'first', '']]
    """
    names = [name for name in EXCLUSIVE if name in kinds] + [name for name in kinds if name not in EXCLUSIVE]
    labels = np.full(next(iter(kinds.values())).shape, NONE, dtype=f"<U{max(map(len, names))}")
    for name in reversed(names):
        labels[kinds[name]] = name
    return labels


def _looks(text: str, goes_on: bool | None) -> list[str]:
    """The kinds of a token by its own text, and whether the next one begins with a letter (None: there is none)."""
    found = []
    if _WORD_START.fullmatch(text):
        found.append("word start")
    elif _LETTERS.fullmatch(text) and goes_on is not None:
        found.append("word part" if goes_on else "word end")
    if _OPENING.fullmatch(text.strip()):
        found.append("left delimiter")
    if _CLOSING.fullmatch(text.strip()):
        found.append("right delimiter")
    if _NUMBER.fullmatch(text):
        found.append("numeric")
    if "\n" in text or "\t" in text or text.strip() in _MARKS:
        found.append("formatting")
    if text and not text.strip():
        found.append("spacing")
    return found


def _repeated(row: Sequence[int]) -> list[bool]:
    """Whether the pair that ends at each place was there before, its end before this one's beginning."""
    first: dict[tuple[int, int], int] = {}
    found = [False]
    for place, pair in enumerate(pairwise(row), start=1):
        found.append(first.setdefault(pair, place) < place - 1)
    return found


class _Follows:
    """How often one token follows another."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._pairs: Counter[tuple[int, int]] = Counter()
        for row in rows:
            self._pairs.update(pairwise(map(int, row)))
        self._firsts: Counter[int] = Counter()
        for (first, _), count in self._pairs.items():
            self._firsts[first] += count

    def share(self, first: int, second: int) -> float:
        """Of all that follows ``first``."""
        return self._pairs[first, second] / max(1, self._firsts[first])
