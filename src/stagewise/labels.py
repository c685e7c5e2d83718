"""Labels and texts as users give them: of samples, or of the tokens of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Labels = Sequence[Any] | np.ndarray[Any, Any]
"""One label per sample, or a row of them, one per token: names, numbers, an array or a tensor; None for no group."""

Texts = Sequence[Sequence[str]]
"""A row of texts for each sample, one for each of its losses."""

NONE = ""
"""The text of no label: what has it is in no group."""


def words(labels: Labels) -> NDArray[np.str_]:
    """Labels as text, each on its own: in an array of its kind 1 beside 2.5 would become "1.0".

    Raises:
        ValueError: some are several labels.
    """
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind == "U":
        return labels  # there may be as many as tokens
    if several := [label for label in labels if _is_row(label)]:
        raise ValueError(f"groups: expected one label for each sample, got {several[0]} for one")
    return np.asarray([_text(label) for label in labels], dtype=np.str_)


def as_labels(labels: Labels, length: int, name: str) -> NDArray[np.str_]:
    """Labels of ``length`` samples ``(samples,)``, or of their tokens ``(samples, tokens)``.

    Rows may be of different lengths, as sequences are: what is missing at their ends is in no group.

    Raises:
        ValueError: there is not one label, or one row of them, for each sample.
    """
    array = labels.numpy(force=True) if isinstance(labels, Tensor) else labels
    if isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype.kind == "U":
        rows: NDArray[np.str_] = array
    else:
        each = list(array)
        if not any(_is_row(label) for label in each):
            rows = words(each)
        elif all(_is_row(label) and np.ndim(label) == 1 for label in each):
            rows = _even([words(list(row)) for row in each])
        else:
            raise ValueError(f"{name}: expected a label for each sample, or a row of labels for each, not both")
    if len(rows) != length:
        raise ValueError(f"{name}: expected one label for each of {length} samples, got shape {rows.shape}")
    return rows


def as_texts(texts: Texts, length: int, name: str) -> list[list[str]]:
    """The text of every token of ``length`` samples; rows may be of different lengths.

    Raises:
        ValueError: there is not one row of texts for each sample.
    """
    if any(isinstance(row, str) or not all(isinstance(text, str) for text in row) for row in texts):
        raise ValueError(f"{name}: expected a row of texts for each sample, one text for each of its losses")
    if len(texts) != length:
        raise ValueError(f"{name}: expected a row of texts for each of {length} samples, got {len(texts)} rows")
    return [[str(text) for text in row] for row in texts]


def token_classes(labels: NDArray[np.str_]) -> tuple[list[str], NDArray[np.intp]]:
    """The distinct labels of tokens, and which of them each token has ``(samples, tokens)``."""
    names, places = np.unique(labels, return_inverse=True)
    return names.tolist(), places.reshape(labels.shape)


class TokenClasses(NamedTuple):
    """The tokens of every sample by their labels.

    Attributes:
        places: the class of each token ``(sample, token)``.
        shares: of every token in the objective ``(sample, token)``.
        total: of every class ``(sample, class)``.
    """

    places: Tensor
    shares: Tensor
    total: Tensor

    @classmethod
    def of(cls, labels: NDArray[np.str_], shares: Tensor) -> TokenClasses:
        """By the labels of every token.

        Raises:
            ValueError: there is not one label for each loss.
        """
        if shares.ndim != 2 or shares.shape != labels.shape:
            raise ValueError(f"there are labels of shape {labels.shape}, but losses of shape {tuple(shares.shape)}")
        names, places = token_classes(labels)
        empty = cls(torch.from_numpy(places).to(shares.device), shares, shares.new_zeros(len(labels), len(names)))
        return empty._replace(total=empty.sums(shares))

    def sums(self, values: Tensor) -> Tensor:
        """Of values ``(..., sample, token)`` over the tokens of each class: ``(..., sample, class)``."""
        sums = values.new_zeros(*values.shape[:-1], self.total.shape[-1])
        return sums.scatter_add_(-1, self.places.expand(values.shape), values)

    def means(self, values: Tensor) -> Tensor:
        """By their shares; 0 where a sample has no token of a class."""
        return self.sums(values * self.shares) / torch.where(self.total > 0, self.total, 1.0)


def _even(rows: Sequence[NDArray[np.str_]]) -> NDArray[np.str_]:
    width = max(len(row) for row in rows)
    return np.stack([np.concatenate([row, np.full(width - len(row), NONE)]) for row in rows])


def _is_row(label: Any) -> bool:
    return isinstance(label, list | tuple) or (isinstance(label, np.ndarray | Tensor) and label.ndim > 0)


def _text(label: Any) -> str:
    if label is None:
        return NONE
    return str(label.item() if isinstance(label, Tensor | np.generic) else label)
