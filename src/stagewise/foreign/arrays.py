"""Scores as one plain array in a file: NumPy's, TRAK's memory maps, safetensors, a tensor by ``torch.save``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from stagewise.foreign.scores import Scores, read_tensor

SUFFIXES = (".npy", ".mmap", ".npz", ".safetensors", ".pt")
"""``.mmap`` is what TRAK calls ``.npy``."""


def read_array(path: Path, transpose: bool) -> Scores:
    """The array (train, query), or (query, train) with ``transpose``; nothing is unpickled.

    Raises:
        ValueError: it cannot be read, or is no matrix of numbers.
    """
    array = read_tensor(path) if path.suffix == ".pt" else _read(path)
    if isinstance(array, torch.Tensor) and not array.is_complex() and array.ndim == 2:
        array = array.double().numpy()  # of bfloat16 too, which NumPy does not have
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        got = f"{array.dtype} of shape {tuple(array.shape)}" if hasattr(array, "shape") else type(array).__name__
        raise ValueError(f"{path}: expected a matrix of numbers (train, query), got {got}")
    values = np.array(array.T if transpose else array, dtype=np.float64)
    return Scores(values, None, None, {"tool": path.name})


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return _only({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return _only(dict(loaded))
    except (OSError, ValueError, EOFError, BadZipFile, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    return loaded


def _only(arrays: Mapping[str, Any]) -> Any:
    """The one array of a file, or the one called "scores"."""
    if len(arrays) != 1 and "scores" not in arrays:
        raise ValueError(f"expected one array, or one called 'scores', got {sorted(arrays)[:8]}")
    return arrays["scores"] if "scores" in arrays else next(iter(arrays.values()))
