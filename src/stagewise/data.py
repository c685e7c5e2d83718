"""Data as the user means them: samples addressed by index, whatever object carries them.

The rules, in the order in which they are tried:

* a tensor or array, and a tuple, list or mapping of tensors or arrays, are *columns*: one row per sample; but a list
  that comes with ``collate`` is one of samples, as a ``DataLoader`` takes it, be they of equal length or not;
* a list or tuple of tuples, lists or mappings is a list of *samples*, as a ``DataLoader`` takes it;
* a mapping, tuple or list of columns of which some are no tensors (texts, lists of unequal length) is read row by row;
* anything else with ``__len__`` and ``__getitem__`` is a map-style dataset, a subclass of ``TensorDataset`` with its
  own ``__getitem__`` included.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from stagewise.checkpoint import tensor_bytes

Batch = Any
"""What the loss receives beside the model: usually tensors whose first axis is the sample, as the data have them."""

Collate = Callable[[list[Any]], Batch]
"""A list of samples to one batch, as ``DataLoader(collate_fn=)`` takes it."""

_HASHED_TOGETHER = 1024
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")
_DEEPEST = 3


class Samples:
    """Data addressed by sample index.

    Args:
        data: see the rules above.
        name: how error messages call this data.
        collate: makes a batch of a list of samples, e.g. by padding; default ``torch.utils.data.default_collate``.
            Columns are cut without it, unless it is given.

    Raises:
        ValueError: the data cannot be addressed by sample, or their columns differ in length.
    """

    def __init__(self, data: Any, name: str = "data", collate: Collate | None = None) -> None:
        if isinstance(data, Samples):
            self.__dict__.update(data.__dict__, name=name)
            return
        self.name = name
        self.collate = collate
        self._rows: Tensor | None = None
        columns = _as_columns(data)
        self._columns = None if columns is None or collate is not None else columns
        items = _as_items(data, columns, name, collated=collate is not None)
        self._items: Any = items
        self._length = len(items)
        if self._length == 0:
            raise ValueError(f"{name}: holds no samples")

    def __len__(self) -> int:
        return self._length if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        return f"{len(self):,} samples, fields {', '.join(self.fields())}"

    def fields(self) -> list[str]:
        """What a batch holds: path, shape of one sample and type of every part."""
        return [f"{path or 'tensor'} {_described(leaf)}".strip() for path, leaf in leaves(self.batch(slice(0, 1)))]

    def subset(self, rows: Tensor) -> Samples:
        """The samples ``rows`` ``(k,)`` of these, under the same name."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        for known in ("digest", "sizes"):
            part.__dict__.pop(known, None)
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def item(self, index: int) -> Any:
        """One sample, as the data give it.

        Raises:
            ValueError: it cannot be read.
        """
        row = index if self._rows is None else int(self._rows[index])
        try:
            return self._items[row]
        except Exception as error:
            raise ValueError(
                f"{self.name}: sample {row} cannot be read ({type(error).__name__}: {error}); expected a map-style "
                f"dataset whose samples are numbered from 0 to {self._length - 1}"
            ) from error

    def batch(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Batch:
        """The samples ``index`` as one batch on ``device``: a copy, that a loss may change.

        Raises:
            ValueError: a sample cannot be read, or the samples do not go together.
        """
        with torch.inference_mode(False):  # a batch that autograd can keep, whatever the caller's mode
            rows = torch.arange(*index.indices(len(self))) if isinstance(index, slice) else index
            return self._batch(rows, device)

    def _batch(self, rows: Tensor, device: torch.device | str) -> Batch:
        if self._columns is not None:
            chosen = rows if self._rows is None else self._rows[rows]
            return tree_map(lambda leaf: leaf[chosen].to(device), self._columns)
        samples = [self.item(row) for row in rows.tolist()]
        try:
            batch = (self.collate or default_collate)(samples)
        except Exception as error:
            raise ValueError(
                f"{self.name}: {len(samples)} samples cannot be made into one batch "
                f"({type(error).__name__}: {_one_line(error)}); pass Task(collate=...), a function that makes one of a "
                "list of samples, e.g. by padding"
            ) from error
        return on_device(batch, device)

    def stacked(self, rows: Tensor, device: torch.device | str = "cpu") -> Batch | None:
        """The batches ``rows`` ``(batch, sample)`` as one, ``(batch, sample, ...)``; None where data are no columns."""
        return None if self._columns is None else self.batch(rows, device)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """All samples in order, in batches of at most ``size``."""
        return (self.batch(slice(i, i + size), device) for i in range(0, len(self), size))

    def few(self, count: int = 4) -> Tensor:
        """Indices of a few samples: the first, the last and some between, ascending."""
        return torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()

    @cached_property
    def sizes(self) -> Tensor:
        """How many numbers each sample is, alone ``(samples,)``: those of one size need no padding beside each other.

        All 0 without ``collate``, where one is like the other.
        """
        if self.collate is None:
            return torch.zeros(len(self), dtype=torch.long)
        return torch.tensor([_size(self.batch(slice(row, row + 1))) for row in range(len(self))])

    def check_steady(self) -> None:
        """Read a few samples twice.

        Raises:
            ValueError: they are others the second time.
        """
        if self._columns is not None:
            return
        for row in self.few(8):
            first, second = (_content(self.batch(row[None])) for _ in range(2))
            if first != second:
                raise ValueError(
                    f"{self.name}: sample {int(row)} is another one each time it is read; switch off random "
                    "augmentation, in the dataset and in collate="
                )

    @cached_property
    def digest(self) -> str:
        """Hash of the content: equal for equal data, whatever object carries it."""
        digest = hashlib.sha256(str(len(self)).encode())
        for batch in self.batches(_HASHED_TOGETHER):
            digest.update(_content(batch))
        return digest.hexdigest()


def leaves(batch: Batch, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a batch that is no container, with the path to it."""
    if isinstance(batch, Mapping):
        parts: list[tuple[Any, Any]] = list(batch.items())
    elif isinstance(batch, list | tuple):
        parts = list(enumerate(batch))
    elif is_dataclass(batch) and not isinstance(batch, type):
        parts = [(field.name, getattr(batch, field.name)) for field in fields(batch)]
    else:
        yield path, batch
        return
    for key, value in parts:
        yield from leaves(value, f"{path}/{key}" if path else str(key))


def _size(batch: Batch) -> int:
    return sum(leaf.numel() for _, leaf in leaves(batch) if isinstance(leaf, Tensor))


def on_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on ``device``; what has no device stays as it is."""

    def moved(leaf: Any) -> Any:
        # BatchEncoding and its like are no pytrees, but know how to move.
        if isinstance(leaf, Tensor) or (isinstance(leaf, Mapping) and hasattr(leaf, "to")):
            return leaf.to(device)
        return leaf

    return tree_map(moved, batch)


class _Rows:
    """Columns that are no tensors, read row by row."""

    def __init__(self, columns: Any, length: int) -> None:
        self._columns, self._length = columns, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Any:
        if isinstance(self._columns, Mapping):
            return {key: _row(column, row) for key, column in self._columns.items()}
        if isinstance(self._columns, Tensor):
            return self._columns[row]
        return tuple(_row(column, row) for column in self._columns)


def _row(column: Any, row: int) -> Any:
    return tree_map(lambda leaf: leaf[row], column) if _all_tensors(column) else column[row]


def _as_columns(data: Any) -> Any | None:
    """The data as a pytree of tensors with one row per sample, if that is what they are."""
    if isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__:
        return data.tensors
    if isinstance(data, Mapping):
        data = dict(data)
    elif isinstance(data, list | tuple):
        if not data or all(isinstance(part, list | tuple | Mapping) for part in data):
            return None
    elif not isinstance(data, Tensor | np.ndarray):
        return None
    columns = tree_map(lambda leaf: _tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, data)
    return columns if _all_tensors(columns) else None


def _as_items(data: Any, columns: Any | None, name: str, collated: bool) -> Any:
    """The data as something that is indexed by sample; ``collated``: a batch is made of a list of them."""
    if columns is not None:
        if collated and isinstance(data, list):
            return data
        lengths = sorted({len(leaf) if leaf.ndim else 0 for leaf in tree_flatten(columns)[0]})
        if len(lengths) != 1:
            raise ValueError(
                f"{name}: tensors disagree on the number of samples, got first axes of {lengths}; every tensor must "
                "have one row per sample. A list of samples is a list of tuples or dicts, and of unequal length they "
                "need Task(collate=...)"
            )
        return _Rows(columns, lengths[0])
    if isinstance(data, DataLoader | IterableDataset):
        raise ValueError(
            f"{name}: got {type(data).__name__}, which cannot be asked for sample i; pass a map-style dataset "
            "(of a DataLoader its .dataset, and its collate_fn as Task(collate=...))"
        )
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        raise ValueError(
            f"{name}: got {type(data).__name__}, whose rows are no samples; pass its columns as arrays, "
            "{'x': frame['x'].to_numpy(), ...}"
        )
    parts = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(parts, list | tuple) and parts and _are_columns(data, parts):
        lengths = sorted({len(part) for part in parts})
        if len(lengths) != 1:
            raise ValueError(f"{name}: columns disagree on the number of samples, got lengths of {lengths}")
        return _Rows(data, lengths[0])
    if isinstance(data, str | bytes | Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            f"{name}: expected a map-style dataset, a list of samples, or a tuple, list or dict of tensors, got "
            f"{type(data).__name__}"
        )
    return data


def _are_columns(data: Any, parts: Sequence[Any]) -> bool:
    """Whether a container without tensors alone holds columns: a mapping, or tensors beside lists."""
    sequences = all(hasattr(part, "__len__") and hasattr(part, "__getitem__") for part in parts)
    some_tensor = any(isinstance(part, Tensor | np.ndarray) for part in parts)
    return sequences and not any(isinstance(part, str) for part in parts) and (isinstance(data, Mapping) or some_tensor)


def _all_tensors(tree: Any) -> bool:
    found = tree_flatten(tree)[0]
    return bool(found) and all(isinstance(leaf, Tensor) for leaf in found)


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    """Numbers as a tensor; texts and objects stay what they are."""
    return torch.from_numpy(np.ascontiguousarray(array)) if array.dtype.kind in "biufc" else array


def _content(batch: Batch, depth: int = 0) -> bytes:
    """What decides a batch, without addresses."""
    digest = hashlib.sha256()
    for path, leaf in leaves(batch):
        digest.update(path.encode())
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
            leaf = torch.from_numpy(np.ascontiguousarray(leaf))
        if isinstance(leaf, Tensor):
            digest.update(tensor_bytes(leaf))
        else:
            digest.update(_words(leaf).encode(errors="surrogatepass"))
            if depth < _DEEPEST and getattr(leaf, "__dict__", None) and not isinstance(leaf, type):
                digest.update(_content(vars(leaf), depth + 1))
    return digest.digest()


def _words(leaf: Any) -> str:
    """What is no tensor, as text."""
    if isinstance(leaf, set | frozenset):
        return repr(sorted(map(_words, leaf)))
    if isinstance(leaf, np.ndarray):
        return repr([_words(entry) for entry in leaf.ravel().tolist()])
    if callable(getattr(leaf, "tobytes", None)) and not isinstance(leaf, np.generic):
        return hashlib.sha256(leaf.tobytes()).hexdigest()  # an image
    return _ADDRESS.sub("", repr(leaf))


def _described(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape[1:])} {str(leaf.dtype).removeprefix('torch.')}"
    return type(leaf).__name__


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
