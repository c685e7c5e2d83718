"""Labels of tokens that hold nothing but chance, to be held beside those that mean something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Labels = np.ndarray[Any, np.dtype[np.str_]]


def shares(labels: Labels, classes: Sequence[str]) -> dict[str, float]:
    """Which part of all tokens is of each class."""
    return {name: float((labels == name).mean()) for name in classes}


def shuffled(labels: Labels, generator: np.random.Generator) -> Labels:
    """Every class has as many tokens at every place of a sequence as before, but which ones is chance.

    Of a class that holds nearly all tokens of its places nearly the same ones stay, and what this control shows of it
    is that the place alone says what its tokens do.
    """
    return generator.permuted(labels, axis=0)


def shuffled_within(labels: Labels, words: ArrayLike, generator: np.random.Generator) -> Labels:
    """Every class has every word as often as before, but where in the text is chance.

    A class by what its words look like stays the same, and what this control shows of it is that nothing else matters;
    one by where they stand holds the same words elsewhere.

    Args:
        labels: ``(sample, token)``.
        words: of the same shape; what is exchanged is alike in it.
        generator: draws the permutation.
    """
    flat, own = np.ravel(words), labels.ravel()
    mixed = np.empty_like(own)
    mixed[np.lexsort((generator.random(len(flat)), flat))] = own[np.argsort(flat, kind="stable")]
    return mixed.reshape(labels.shape)
