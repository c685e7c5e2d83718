"""``cells.json``: the cells of a run by name. All who work on it must agree on them; by them its state is known."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from stagewise.run.kept import ended
from stagewise.traces.files import PARTIAL, RunFolderError, explain_read, explain_write, fsync, write_text
from stagewise.traces.identity import check_identity, read_identity
from stagewise.traces.store import RunMismatchError

_FILE = "cells.json"
_OF_RUN = ("identity.json", "config.yaml", "provenance.json", "labels.json", _FILE)
_SHOWN = 5


@dataclass(frozen=True)
class Listed:
    """A cell by name.

    Attributes:
        name: what it is, in words.
        stage: its stage.
        file: where it is in the run folder once it is complete.
    """

    name: str
    stage: str
    file: str

    def is_complete(self, root: Path) -> bool:
        """Whether the folder holds it, or the reason why it does not exist."""
        return ended(root, self.file)


@dataclass(frozen=True)
class CellList:
    """The cells of a run.

    Attributes:
        cells: all of them.
        digest: hash of all that decides their numbers.
    """

    cells: tuple[Listed, ...]
    digest: str

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        """Of cells of any stage."""
        listed = tuple(Listed(str(cell), cell.stage, cell.file) for cell in cells)
        keys = [f"{cell.file} {getattr(cell, 'key', '')}" for cell in cells]
        return cls(listed, hashlib.sha256("\0".join(sorted(keys)).encode()).hexdigest())

    @classmethod
    def read(cls, root: Path) -> Self | None:
        """That of a run folder; None where it has none.

        Raises:
            RunFolderError: it is damaged.
        """
        path = root / _FILE
        if not path.exists():
            return None
        with explain_read(root, _FILE):
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(Listed(*map(str, cell)) for cell in content["cells"]), str(content["digest"]))

    def write(self, root: Path) -> None:
        """Into a run folder.

        Raises:
            RunFolderError: it cannot be written.
        """
        cells = [[cell.name, cell.stage, cell.file] for cell in self.cells]
        with explain_write(root):
            write_text(root / _FILE, json.dumps({"digest": self.digest, "cells": cells}))

    def agree(self, root: Path) -> None:
        """Be that of the folder, which is written if there is none.

        Raises:
            RunMismatchError: the folder has another list.
        """
        there = type(self).read(root)
        if there is None:
            self.write(root)
        elif there.digest != self.digest:
            raise RunMismatchError(
                f"{root} is being filled with other cells: {len(there.cells)} (list {there.digest[:12]}), and here "
                f"there are {len(self.cells)} (list {self.digest[:12]}). All slices of a run need the same "
                "configuration, task, checkpoints and version: begin in another folder (out=...), or delete "
                f"{root / _FILE} where it is of an earlier run that is to be continued with other settings"
            )

    def missing(self, root: Path) -> list[Listed]:
        """Those that the folder lacks."""
        return [cell for cell in self.cells if not cell.is_complete(root)]


def check_whole(root: Path, cells: CellList) -> None:
    """Refuse a folder that lacks some of these cells.

    Raises:
        RunMismatchError: it was filled with others.
        ValueError: some are missing, with their names.
    """
    cells.agree(root)
    if missing := cells.missing(root):
        shown = ", ".join(cell.name for cell in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{root} lacks {len(missing)} of {len(cells.cells)} cells: {shown}{more}. Run the slices that lack them "
            f"again, or `stagewise run {root / 'config.yaml'}`, which computes what is missing"
        )


def collect(source: Path, root: Path) -> None:
    """Copy what another folder of the same run holds and this one does not; each file whole or not at all.

    Raises:
        RunFolderError: one of them is no run folder.
        RunMismatchError: they are of different runs.
    """
    there = CellList.read(source)
    if there is None:
        raise RunFolderError(f"{source} holds no slice of a run: it has no {_FILE}")
    if not (root / "identity.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        for name in _OF_RUN:
            _copy(source / name, root / name)
    check_identity(root, read_identity(root), read_identity(source))
    there.agree(root)
    for folder in ("cells", "kept"):
        (root / folder).mkdir(exist_ok=True)
        for file in sorted((source / folder).glob("[!.]*")):
            if file.suffix != ".underway" and not (root / folder / file.name).exists():
                _copy(file, root / folder / file.name)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f"{PARTIAL}{target.name}-{os.getpid()}")
    try:
        with explain_write(target.parent):
            shutil.copyfile(source, partial)
            fsync(partial)
            partial.replace(target)
            fsync(target.parent)
    finally:
        partial.unlink(missing_ok=True)
