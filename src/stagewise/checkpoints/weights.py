"""One file of weights, whoever wrote it, as named tensors that can be used; or several, by their index.

Pickles are read as weights only: unpickling anything else would run the code it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagewise.checkpoint import CheckpointError
from stagewise.piece import Wanted

STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")

INSIDE_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files that the weights of a Hugging Face folder are read from, the best one first."""


def read_weights(path: Path, wanted: Wanted | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors on the CPU, at least float32, and the header of a safetensors file (empty for others).

    Args:
        path: the file, or the index of files that stand beside it (``model.safetensors.index.json``).
        wanted: which rows of the tensors of safetensors files; default all. Of other files all are read.

    Raises:
        CheckpointError: the file, or one of an index, is missing, damaged, refused, holds no state dict, other tensors
            than the index says, or values that are not finite.
    """
    if path.suffix == ".json":
        return _read_all(path, wanted), {}
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path, wanted)
    else:
        tensors, metadata = _state_dict_in(load_tensors_only(path), path), {}
    return {name: usable(tensor, name, path) for name, tensor in tensors.items()}, metadata


def shards_of(index: Path) -> dict[str, list[str]]:
    """The files that an index names, and the tensors each of them holds.

    Raises:
        CheckpointError: it is missing, damaged, or names files elsewhere.
    """
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, file in files.items():
            shards.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {index} as an index of weights: {reason_of(error)}") from error
    suffix = "." + index.name.split(".")[1]
    if not shards or not all(isinstance(f, str) and Path(f).name == f and f.endswith(suffix) for f in shards):
        raise CheckpointError(f"{index} must name files of weights ({suffix}) that stand beside it")
    return shards


def reason_of(error: Exception) -> str:
    """The first line of what went wrong, without the path that the message around it already gives."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def _read_all(index: Path, wanted: Wanted | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file, names in shards_of(index).items():
        part, _ = read_weights(index.with_name(file), wanted)
        if lacking := [name for name in names if name not in part]:
            raise CheckpointError(
                f"{index} says that {file} holds {lacking[0]!r}, but it does not; is it of another run?"
            )
        if twice := [name for name in part if name in tensors]:
            raise CheckpointError(f"{twice[0]!r} is in several of the files that {index} names; which is right?")
        tensors |= part
    return tensors


def _read_safetensors(path: Path, wanted: Wanted | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: _read_tensor(file, name, wanted) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}, is it damaged or cut off? {reason_of(error)}") from error


def _read_tensor(file: Any, name: str, wanted: Wanted | None) -> Tensor:
    """The rows of a tensor that are wanted."""
    shape = tuple(file.get_slice(name).get_shape()) if wanted else ()
    piece = wanted(name, shape) if wanted else None
    if piece is None or piece.own == shape:
        tensor: Tensor = file.get_tensor(name)
        return tensor
    rows: Tensor = file.get_slice(name)[(*(slice(None),) * piece.axis, slice(piece.start, piece.start + piece.size))]
    return rows


def load_tensors_only(path: Path, content: IO[bytes] | None = None) -> Any:
    """What ``torch.save`` wrote, of tensors and plain values; whatever would run code is refused.

    Args:
        path: the file.
        content: what of it is to be read, if not all.

    Raises:
        CheckpointError: the file is missing, damaged or refused.
    """
    try:
        return torch.load(path if content is None else content, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"it asks for {asked[1]}" if asked else "it is damaged, or a pickle of something else"
        raise CheckpointError(
            f"{path} was refused: {holds}; only weights are read, because unpickling anything else would run "
            "code. Save model.state_dict() alone, best as safetensors"
        ) from error
    except Exception as error:  # torch.load fails in many ways on a damaged file, none of which names the file
        raise CheckpointError(f"cannot read {path}, is it damaged or cut off? {reason_of(error)}") from error


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    candidates = [content]
    if isinstance(content, dict):
        candidates += [content[key] for key in STATE_DICT_KEYS if key in content]
    for candidate in candidates:
        if _is_state_dict(candidate):
            return _without_aliases(candidate)
    found = f"a dict with {sorted(map(str, content))[:8]}" if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{path} holds {found}, expected a state dict (names to tensors), alone or under one of {STATE_DICT_KEYS}"
    )


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(t, Tensor) for t in content.values())


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once: the first name is the one that moves, a copy under the second would go stale.

    Tensors are one only if they are the same numbers at the same place: of one shape and order, not slices, transposes,
    conjugates or other views of one storage, nor empty.
    """
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        view = (tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.data_ptr(), *view) if tensor.numel() else name
        first.setdefault(place, name)
    return {name: tensors[name] for name in first.values()}


def usable(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor in at least float32.

    Raises:
        CheckpointError: it holds NaN or plus infinity.
    """
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
    bad = int((~(tensor < torch.inf)).sum())  # true for NaN and inf, false for the -inf of a mask
    if bad:
        raise CheckpointError(
            f"{path}: {name!r} has {bad} values that are NaN or infinite; the run had diverged, or the file is damaged"
        )
    return tensor
