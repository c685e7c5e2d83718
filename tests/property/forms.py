"""The same numbers in every form in which people keep data, and the batches that they would make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

Columns = dict[str, Tensor]
"""``x``, ``y`` and perhaps ``w``, one row per sample."""


@dataclass(frozen=True)
class Form:
    """One form of data.

    Attributes:
        of: the data as a user has them, from columns.
        batch: the samples ``rows`` of such data as a batch, made by hand.
        named: fields have names; otherwise they have places.
        collate: to be passed on.
    """

    of: Callable[[Columns], Any]
    batch: Callable[[Any, list[int]], Any]
    named: bool = False
    collate: Callable[[list[Any]], Any] | None = None


class Halved(TensorDataset):
    """A dataset that normalises what it holds."""

    def __getitem__(self, index):
        x, *rest = super().__getitem__(index)
        return (x / 2 if x.is_floating_point() else x, *rest)


class Records(Dataset):
    """A map-style dataset of dicts."""

    def __init__(self, columns: Columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["x"])

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: column[index] for name, column in self.columns.items()}


class Sample(NamedTuple):
    x: Tensor
    y: Tensor


class Triple(NamedTuple):
    x: Tensor
    y: Tensor
    w: Tensor


def columns_at(data, rows):
    if isinstance(data, dict):
        return {name: columns_at(column, rows) for name, column in data.items()}
    if isinstance(data, tuple | list):
        return type(data)(columns_at(column, rows) for column in data)
    return torch.as_tensor(data[rows])


def collated(data, rows):
    return default_collate([data[row] for row in rows])


def texts_at(data, rows):
    return {name: [c[row] for row in rows] if isinstance(c, list) else c[rows] for name, c in data.items()}


def samples(columns):
    fields = list(columns.values())
    return [tuple(field[i] for field in fields) for i in range(len(fields[0]))]


def named_samples(columns):
    kind = Triple if "w" in columns else Sample
    return [kind(*sample) for sample in samples(columns)]


def text_records(columns):
    records = Records(columns)
    return [{**records[i], "text": f"sample {i}"} for i in range(len(records))]


def ragged(columns):
    """Sequences of unequal length: sample i lacks its last i mod 2 tokens."""
    length = columns["x"].shape[1]
    cut = [length - i % 2 for i in range(len(columns["x"]))]
    return [{name: column[i, : cut[i]] for name, column in columns.items()} for i in range(len(cut))]


def padded(batch):
    """Padding has weight 0; what is there otherwise must not matter."""
    return {name: pad_sequence([s[name] for s in batch], batch_first=True) for name in batch[0]}


def stacked_by_hand(batch):
    return {name: torch.stack([sample[name] for sample in batch]) for name in ("x", "y", "w") if name in batch[0]}


FORMS: dict[str, Form] = {
    "tuple": Form(lambda c: tuple(c.values()), columns_at),
    "dict": Form(dict, columns_at, named=True),
    "list of tensors": Form(lambda c: list(c.values()), columns_at),
    "TensorDataset": Form(lambda c: TensorDataset(*c.values()), collated),
    "TensorDataset of its own": Form(lambda c: Halved(*c.values()), collated),
    "dataset": Form(Records, collated, named=True),
    "subset": Form(lambda c: Subset(Records(c), range(len(c["x"]))), collated, named=True),
    "two datasets": Form(
        lambda c: ConcatDataset([Records({k: v[:3] for k, v in c.items()}), Records({k: v[3:] for k, v in c.items()})]),
        collated,
        named=True,
    ),
    "samples": Form(samples, collated),
    "named samples": Form(named_samples, collated, named=False),
    "records with text": Form(text_records, collated, named=True),
    "columns with text": Form(lambda c: {**c, "text": [f"{i}" for i in range(len(c["x"]))]}, texts_at, named=True),
    "numpy": Form(lambda c: tuple(column.numpy() for column in c.values()), columns_at),
    "dict of numpy": Form(lambda c: {k: v.numpy() for k, v in c.items()}, columns_at, named=True),
    "own collate": Form(
        text_records, lambda d, rows: stacked_by_hand([d[r] for r in rows]), named=True, collate=stacked_by_hand
    ),
    "ragged": Form(ragged, lambda d, rows: padded([d[r] for r in rows]), named=True, collate=padded),
}
"""By what carries the data."""
