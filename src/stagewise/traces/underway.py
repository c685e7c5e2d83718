"""Chains that are under way, kept beside the cells: hours in a cell of a large model are not lost with its process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stagewise.traces.files import PARTIAL, explain_write, fsync

SECONDS = 300.0
"""Between one time that chains are kept and the next: at most so much work is lost."""


class UnderwayFile:
    """The chains of one cell in one file, whole or not there.

    Args:
        path: of the file.
        key: of the cell; what was kept under another is not taken up.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._last = path, key, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was kept; None if there is nothing, or nothing that can be read: then the cell begins again."""
        try:
            kept: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
            return kept["state"] if kept["key"] == self._key else None
        except MemoryError:
            raise
        except Exception:  # whatever a damaged file makes of a reader
            return None

    def keep(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state, if the last time is long enough ago.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        if time.monotonic() - self._last < SECONDS:
            return
        partial = self._path.with_name(f"{PARTIAL}{self._path.name}-{os.getpid()}")
        try:
            with explain_write(self._path.parent.parent):
                with partial.open("wb") as file:  # given a name, torch does not say that the disk is full
                    torch.save({"key": self._key, "state": state()}, file)
                fsync(partial)
                partial.replace(self._path)
                fsync(self._path.parent)
        finally:
            partial.unlink(missing_ok=True)
        self._last = time.monotonic()
