"""What the ``.metadata`` of ``torch.distributed.checkpoint`` says, and the tensors and values that it stands for.

It says which tensors and values were saved, into which parts each tensor was cut, and where in the ``.distcp`` files
these lie. It is a pickle of torch's own records; here all of them become records without any code, and whatever else it
asks for is refused. Tensors and values are read one by one, as weights only, without a process group.
"""

from __future__ import annotations

import io
import math
import operator
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from stagewise.checkpoint import CheckpointError
from stagewise.checkpoints.weights import load_tensors_only, reason_of
from stagewise.piece import Piece, Wanted

METADATA = ".metadata"

_RECORDS = {
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    # Of torch before 2.3.
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    # How the layout is stored, and where the folder once was.
    "torch.serialization._get_layout",
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}

Tree = dict[Any, Any]
"""The nested dict that was saved, lists as dicts by number; a leaf is the key of a tensor or value."""


@dataclass(frozen=True)
class _Layout:
    """A tensor: its shape, type, and the ``(offsets, sizes)`` of its parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Index:
    """What a ``.metadata`` says.

    Attributes:
        file: it.
        tree: the nested dict that was saved, each leaf a key.
        layouts: of the tensors by key; the other keys are plain values.
        places: by key and offsets (None for values), the name of a file, where in it, and how many bytes.
        wanted: which rows of a tensor are read; None: all.
    """

    file: Path
    tree: Tree
    layouts: Mapping[str, _Layout]
    places: Mapping[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]
    wanted: Wanted | None = None

    def loaded(self, tree: Tree) -> Tree:
        """The tree, or one below it, with what its leaves stand for.

        Raises:
            CheckpointError: as :meth:`tensor`.
        """
        return {name: self.loaded(leaf) if isinstance(leaf, dict) else self._item(leaf) for name, leaf in tree.items()}

    def tensor(self, key: str) -> Tensor:
        """A tensor in one piece, or those rows of it that are wanted: what has none of them is not read.

        Raises:
            CheckpointError: a file is missing, damaged, refused, or its parts are not those of this tensor.
        """
        layout = self.layouts[key]
        piece = self.wanted(key, layout.shape) if self.wanted else None
        if piece is not None and piece.own != layout.shape:
            return self._rows(key, layout, piece)
        if len(layout.parts) == 1 and layout.parts[0][1] == layout.shape:
            return self._part(key, *layout.parts[0])
        if sum(math.prod(sizes) for _, sizes in layout.parts) != math.prod(layout.shape):
            raise CheckpointError(f"{self.file}: the parts of {key!r} leave gaps in it, or overlap")
        whole, filled = torch.empty(layout.shape, dtype=layout.dtype), torch.zeros(layout.shape, dtype=torch.bool)
        for offsets, sizes in layout.parts:
            here = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            whole[here] = self._part(key, offsets, sizes)
            filled[here] = True
        if not filled.all():
            raise CheckpointError(f"{self.file}: the parts of {key!r} leave gaps in it, or overlap")
        return whole

    def _rows(self, key: str, layout: _Layout, piece: Piece) -> Tensor:
        first, last, axis = piece.start, piece.start + piece.size, piece.axis
        rows, filled = torch.empty(piece.own, dtype=layout.dtype), torch.zeros(piece.own, dtype=torch.bool)
        for offsets, sizes in layout.parts:
            start, stop = max(first, offsets[axis]), min(last, offsets[axis] + sizes[axis])
            if start >= stop or not math.prod(sizes):
                continue
            there = [slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True)]
            there[axis] = slice(start - first, stop - first)
            rows[tuple(there)] = self._part(key, offsets, sizes).narrow(axis, start - offsets[axis], stop - start)
            filled[tuple(there)] = True
        if not filled.all():
            raise CheckpointError(f"{self.file}: the parts of {key!r} leave gaps in it")
        return rows

    def _part(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        part = self._read(key, offsets)
        if not (isinstance(part, Tensor) and part.shape == sizes and part.dtype == self.layouts[key].dtype):
            raise CheckpointError(
                f"{self.file}: a part of {key!r} is not the tensor of shape {sizes} that it says; is one of the files "
                "of another checkpoint?"
            )
        return part.detach()

    def _item(self, key: str) -> Any:
        return self.tensor(key) if key in self.layouts else self._read(key, None)

    def _read(self, key: str, offsets: tuple[int, ...] | None) -> Any:
        """One blob of ``torch.save``, without what stands around it."""
        if (key, offsets) not in self.places:
            raise CheckpointError(f"{self.file} does not say where {key!r} is stored")
        name, start, length = self.places[key, offsets]
        file = self.file.with_name(name)
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                blob = stream.read(length)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}, which {METADATA} names: {reason_of(error)}") from error
        if len(blob) != length:
            raise CheckpointError(f"cannot read {key!r} in {file}: the file is cut off")
        return load_tensors_only(file, io.BytesIO(blob))


def read_index(file: Path, wanted: Wanted | None = None) -> Index:
    """What this ``.metadata`` says; ``wanted`` chooses the rows that are going to be read.

    Raises:
        CheckpointError: it is missing, damaged, refused, or names files elsewhere.
    """
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream).load()
    except _RefusedError as error:
        raise CheckpointError(
            f"{file} was refused: it asks for {error}; only the records of torch.distributed.checkpoint are read, "
            "because unpickling anything else would run code"
        ) from error
    except Exception as error:  # pickles that are damaged fail in many ways
        raise CheckpointError(f"cannot read {file}, is it damaged or cut off? {reason_of(error)}") from error
    try:
        paths = content.fields.get("planner_data") or {}
        items = content["state_dict_metadata"]
        tree = _tree({key: paths.get(key, (key,)) for key in items})
        layouts = {key: _layout(item) for key, item in items.items() if "chunks" in item.fields}
        places = {_place(index): _stored(file, info) for index, info in content["storage_data"].items()}
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is not the metadata of torch.distributed.checkpoint: {error!r}") from error
    return Index(file, tree, layouts, places, wanted)


class _Record:
    """Stands for any record of a ``.metadata``: what it was made with, and nothing that could run."""

    fields: Any = MappingProxyType({})

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, fields: Any) -> None:
        self.fields = fields

    def __getitem__(self, name: Any) -> Any:
        return self.fields[name]


class _RefusedError(Exception):
    """The name of what a pickle asks for."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if f"{module}.{name}" in _RECORDS:
            return _Record
        raise _RefusedError(f"{module}.{name}")


def _tree(paths: Mapping[str, Sequence[Any]]) -> Tree:
    tree: Tree = {}
    for key, path in paths.items():
        here = tree
        for name in path[:-1]:
            here = here.setdefault(name, {})
        here[path[-1]] = key
    return tree


def _layout(item: _Record) -> _Layout:
    shape, dtype = _integers(item["size"]), item["properties"][0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is no type of numbers")
    parts = [(_integers(chunk["offsets"]), _integers(chunk["sizes"])) for chunk in item["chunks"]]
    for offsets, sizes in parts:
        if any(start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a part at {offsets} of shape {sizes} is not within {shape}")
    return _Layout(shape, dtype, parts)


def _place(index: _Record) -> tuple[str, tuple[int, ...] | None]:
    offset = index.fields.get("offset")
    return index["fqn"], None if offset is None else _integers(offset)


def _stored(file: Path, info: _Record) -> tuple[str, int, int]:
    name = info["relative_path"]
    if Path(name).name != name:
        raise CheckpointError(f"{file} must name files that stand beside it, but names {name}")
    if info.fields.get("transform_descriptors"):
        raise CheckpointError(
            f"{file} is of a checkpoint that was compressed or changed in another way while it was written "
            f"({info['transform_descriptors'][0]}); save it without extensions"
        )
    return name, *_integers((info["offset"], info["length"]))


def _integers(values: Any) -> tuple[int, ...]:
    integers = tuple(operator.index(value) for value in values)
    if any(number < 0 for number in integers):
        raise ValueError(f"{integers} has a negative number")
    return integers
