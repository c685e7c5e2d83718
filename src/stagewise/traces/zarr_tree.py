"""A tree of numbers as a Zarr v3 group in one zip file and back.

Words become CF flags (codes with their meanings in the attributes), so that the arrays hold plain numbers and
reading a stranger's file runs nobody's code. One file, since file systems of clusters count them; the zip file's
checksums see what is torn or flipped.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
import zarr
from zarr.buffer.cpu import Buffer
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

# The codec refuses buffers of 2 GiB and more.
_CHUNK_BYTES = 2**26

# The root attribute that says what a folder is and what it must hold; the others are the tree's own.
_LABEL = "stagewise"

_METADATA = "zarr.json"


def write_tree(tree: xr.DataTree, file: Path, label: Mapping[str, Any]) -> None:
    """Write a tree as a Zarr group that carries a label; equal trees give files of equal bits.

    Raises:
        ValueError: the tree holds something else than numbers and words, or labels that are no dimension, or
            attributes that are not JSON.
    """
    groups = {node.path.strip("/"): _encode_group(node) for node in tree.subtree}
    contents = {path: list(variables) for path, (variables, _) in groups.items()}
    attrs = groups[""][1] | {_LABEL: _to_json(dict(label) | {"contents": contents})}
    entries: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(entries), zarr_format=3, attributes=attrs)
    for path, (variables, attrs) in groups.items():
        group = root.create_group(path, attributes=attrs) if path else root
        for name, variable in variables.items():
            group.create_array(
                name,
                data=variable.values,
                chunks=_chunks(variable.shape, variable.dtype.itemsize),
                compressors=ZstdCodec(level=1),
                dimension_names=[str(dim) for dim in variable.dims],
                attributes=variable.attrs,
                # Then a chunk that is not there is a chunk that was lost.
                config={"write_empty_chunks": True},
            )
    with zipfile.ZipFile(file, "w") as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name), entries[name].to_bytes())  # the time of day is no part of it


def read_tree(file: Path, only: str | None = None) -> xr.DataTree:
    """Read what :func:`write_tree` wrote, into memory.

    Args:
        file: the zip file.
        only: name of the only arrays to read; default all.

    Raises:
        Exception: something is missing or damaged; what is raised depends on the damage.
    """
    entries = _entries(file, lambda name: only is None or name.endswith(_METADATA) or f"/{only}/" in name)
    root = _group(entries)
    groups = {}
    for path, names in _label(root)["contents"].items():
        group: Any = root[path] if path else root
        wanted = [name for name in names if only in (None, name)]
        arrays = {name: _decode(group[name], entries) for name in wanted}
        groups[path or "/"] = xr.Dataset(arrays, attrs=_attrs(group))
    return xr.DataTree.from_dict(groups)


def read_attrs(file: Path) -> dict[str, Any]:
    """The attributes of the tree, without its arrays."""
    return _attrs(_group(_entries(file, _METADATA.__eq__)))


def read_label(file: Path) -> dict[str, Any]:
    """The label it was written with, and its ``contents``: names of the arrays by group."""
    return _label(_group(_entries(file, _METADATA.__eq__)))


def _entries(file: Path, wanted: Callable[[str], bool]) -> dict[str, Buffer]:
    """Those entries of a zip file whose names are wanted, each held against its checksum."""
    with zipfile.ZipFile(file) as archive:
        return {name: Buffer.from_bytes(archive.read(name)) for name in archive.namelist() if wanted(name)}


def _group(entries: Mapping[str, Buffer]) -> zarr.Group:
    # Version 3 only: version 2 knows pickled arrays.
    return zarr.open_group(MemoryStore(dict(entries)), mode="r", zarr_format=3)


def _attrs(group: zarr.Group) -> dict[str, Any]:
    return {name: value for name, value in _from_json(dict(group.attrs)).items() if name != _LABEL}


def _label(root: zarr.Group) -> dict[str, Any]:
    return cast(dict[str, Any], _from_json(dict(root.attrs)[_LABEL]))


def _encode_group(node: xr.DataTree) -> tuple[dict[str, xr.Variable], dict[str, Any]]:
    dataset = node.to_dataset()
    if labels := sorted(str(name) for name in set(dataset.coords) - set(dataset.dims)):
        raise ValueError(f"{node.path}: only dimensions may have coordinates here, got {labels}")
    variables = {str(name): _encode(f"{node.path}/{name}", v) for name, v in dataset.variables.items()}
    return variables, _to_json(dataset.attrs)


def _encode(path: str, variable: xr.Variable) -> xr.Variable:
    attrs = _to_json(variable.attrs)
    if variable.dtype.kind in "biuf":
        return xr.Variable(variable.dims, np.ascontiguousarray(variable.values), attrs)
    words = variable.values.ravel().tolist()
    if bad := [word for word in words if not isinstance(word, str) or word.split() != [word]]:
        raise ValueError(f"'{path}' must hold numbers or single words such as 'not_localised', got {bad[0]!r}")
    meanings = sorted(set(words))
    codes = np.array([meanings.index(word) for word in words], dtype=np.int8).reshape(variable.shape)
    flags = {"flag_values": list(range(len(meanings))), "flag_meanings": " ".join(meanings)}
    return xr.Variable(variable.dims, codes, attrs | flags)


def _decode(array: Any, entries: Mapping[str, Buffer]) -> xr.Variable:
    if not isinstance(array, zarr.Array):
        raise TypeError(f"expected an array, got {type(array).__name__}")
    if sum(name.startswith(f"{array.path}/c") for name in entries) != array.nchunks:
        raise ValueError(f"{array.path!r} lacks some of its chunks")
    dims = cast(Any, array.metadata).dimension_names
    values, attrs = np.asarray(array[...]), _from_json(dict(array.attrs))
    if meanings := attrs.pop("flag_meanings", None):
        values = np.array(meanings.split())[values]
        del attrs["flag_values"]
    return xr.Variable(dims, values, attrs)


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    chunks = list(shape)
    while math.prod(chunks) * itemsize > _CHUNK_BYTES:
        largest = chunks.index(max(chunks))
        chunks[largest] = -(-chunks[largest] // 2)
    return tuple(max(chunk, 1) for chunk in chunks)


def _to_json(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes for any JSON reader; NaN and infinity, which JSON lacks, become ``{"float": "nan"}``."""
    return {str(name): _plain(value, name) for name, value in attrs.items()}


def _plain(value: Any, name: Hashable) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    try:
        json.dumps(value)
    except TypeError:
        raise ValueError(f"attribute {name!r} must be JSON (number, string, list, ...), got {value!r}") from None
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        return {key: _from_json(item) for key, item in value.items()}
    return value
