"""States of a replay in files without a name: gone as soon as they are not needed, also when the process is killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
from torch import Tensor

from stagewise.retraining.updates import TrainingState

_SHARE = 0.5  # of the free disk: others may need some too
_MOST = 256  # files that are open at once: systems allow about a thousand


def room_on_disk(folder: Path, size: int) -> int:
    """How many states of so many bytes may be kept in a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return min(_MOST, int(_SHARE * shutil.disk_usage(folder).free / size))


def on_disk(folder: Path, vectors: Sequence[str], state: TrainingState) -> Callable[[], TrainingState]:
    """Write some vectors of a state to a file.

    Args:
        folder: where.
        vectors: names of the attributes that differ from state to state; the others stay in memory.
        state: which is not held.

    Returns:
        What reads the state again, with the same bits on the same device.

    Raises:
        OSError: the disk is full.
    """
    file = TemporaryFile(dir=folder)  # noqa: SIM115 - open for as long as it may be read
    kept = {name: getattr(state, name) for name in vectors}
    read = {name: _writes(file, vector) for name, vector in kept.items()}
    rest = replace(state, **{name: vector.new_empty(0) for name, vector in kept.items()})
    del state, kept

    def back() -> TrainingState:
        file.seek(0)
        return replace(rest, **{name: one() for name, one in read.items()})

    return back


def _writes(file: IO[bytes], vector: Tensor) -> Callable[[], Tensor]:
    """Append a tensor to a file, and return what reads it where it stands."""
    shape, dtype, device = vector.shape, vector.dtype, vector.device
    count = vector.numel() * vector.element_size()
    vector.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)

    def read() -> Tensor:
        read = torch.from_numpy(np.fromfile(file, np.uint8, count))
        return read.view(dtype).reshape(shape).to(device)

    return read
