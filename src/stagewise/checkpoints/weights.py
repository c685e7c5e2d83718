"""One file of weights, whoever wrote it, as named tensors that can be used.

Pickles are read as weights only: unpickling anything else would run the code it holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagewise.checkpoint import CheckpointError

_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors on the CPU, at least float32, and the header of a safetensors file (empty for others).

    Raises:
        CheckpointError: the file is missing, damaged, refused, holds no state dict, or values that are not
            finite.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        tensors, metadata = _read_pickle(path), {}
    return {name: _usable(tensor, name, path) for name, tensor in tensors.items()}, metadata


def reason_of(error: Exception) -> str:
    """The first line of what went wrong, without the path that the message around it already gives."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}, is it damaged or cut off? {reason_of(error)}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"it asks for {asked[1]}" if asked else "it is damaged, or a pickle of something else"
        raise CheckpointError(
            f"{path} was refused: {holds}; only weights are read, because unpickling anything else would run "
            "code. Save model.state_dict() alone, best as safetensors"
        ) from error
    except Exception as error:  # torch.load fails in many ways on a damaged file, none of which names the file
        raise CheckpointError(f"cannot read {path}, is it damaged or cut off? {reason_of(error)}") from error
    candidates = [content]
    if isinstance(content, dict):
        candidates += [content[key] for key in _STATE_DICT_KEYS if key in content]
    for candidate in candidates:
        if _is_state_dict(candidate):
            return _without_aliases(candidate)
    found = f"a dict with {sorted(map(str, content))[:8]}" if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{path} holds {found}, expected a state dict (names to tensors), alone or under one of {_STATE_DICT_KEYS}"
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


def _usable(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float() if tensor.dtype.itemsize < 4 else tensor
    bad = int((~(tensor < torch.inf)).sum())  # true for NaN and inf, false for the -inf of a mask
    if bad:
        raise CheckpointError(
            f"{path}: {name!r} has {bad} values that are NaN or infinite; the run had diverged, or the file is damaged"
        )
    return tensor
