"""Chains that are under way, kept beside the cells: hours in a cell of a large model are not lost with its process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stagewise.traces.files import explain_write, whole

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
        kept = {"key": self._key, "state": state()}
        # Given a name in the place of a file, torch does not say that the disk is full.
        with explain_write(self._path.parent.parent), whole(self._path) as partial, partial.open("wb") as file:
            torch.save(kept, file)
        self._last = time.monotonic()
