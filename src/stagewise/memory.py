"""Running out of memory, under all the names it has; and giving memory back."""

from __future__ import annotations

import ctypes
import errno
import os
import traceback

import torch
import xarray as xr

# Of RuntimeErrors: CUDA and MPS, the CPU's allocator on Linux and on Windows, cuBLAS and cuDNN.
_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "_alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice; PyTorch often says it by a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it for later: gigabytes after a large model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def let_go(error: BaseException) -> None:
    """Free what the functions hold that an error came through; where it was raised stays known."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    give_back()


def release(tree: xr.DataTree) -> None:
    """Free a tree that is not needed any more: parents and children are cycles, which else stay for an unknown time."""
    for node in list(tree.subtree):
        node.orphan()
