"""``cells.json``: the cells of a run by name. All who work on it must agree on them; by them its state is known."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Self

from stagewise.run.kept import all_ended
from stagewise.run.vouching import check_alike
from stagewise.traces.files import RunFolderError, explain_read, explain_write, whole, write_text
from stagewise.traces.identity import check_identity
from stagewise.traces.store import RunMismatchError, TraceStore

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


@dataclass(frozen=True)
class CellList:
    """The cells of a run.

    Attributes:
        cells: all of them.
        digest: hash of all that decides their numbers.
        reported: whether there is a report of all of them.
    """

    cells: tuple[Listed, ...]
    digest: str
    reported: bool = False

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        """Of cells of any stage."""
        listed = tuple(Listed(str(cell), cell.stage, cell.file) for cell in cells)
        keys = [f"{cell.file} {getattr(cell, 'key', '')}" for cell in cells]
        return cls(listed, hashlib.sha256("\0".join(sorted(keys)).encode()).hexdigest())

    @classmethod
    def read(cls, store: TraceStore) -> Self | None:
        """That of a run folder; None where it has none.

        Raises:
            RunFolderError: it is damaged.
        """
        if not store.has(_FILE):
            return None
        with explain_read(store.root, _FILE):
            content = json.loads((store.root / _FILE).read_text(encoding="utf-8"))
            cells = tuple(Listed(*map(str, cell)) for cell in content["cells"])
            return cls(cells, str(content["digest"]), bool(content["reported"]))

    def write(self, store: TraceStore) -> None:
        """Into a run folder.

        Raises:
            RunFolderError: it cannot be written.
        """
        cells = [[cell.name, cell.stage, cell.file] for cell in self.cells]
        with explain_write(store.root):
            content = {"digest": self.digest, "reported": self.reported, "cells": cells}
            write_text(store.root / _FILE, json.dumps(content))
        store.push(_FILE)

    def agree(self, store: TraceStore) -> None:
        """Be that of the folder, which is written if there is none.

        Raises:
            RunMismatchError: the folder has another list.
        """
        there = type(self).read(store)
        if there is None:
            self.write(store)
        elif there.digest != self.digest:
            raise RunMismatchError(
                f"{store.place} is being filled with other cells: {len(there.cells)} (list {there.digest[:12]}), and "
                f"here there are {len(self.cells)} (list {self.digest[:12]}). All slices of a run need the same "
                "configuration, task, checkpoints and version: begin in another folder (out=...), or delete "
                f"{_FILE} in it where it is of an earlier run that is to be continued with other settings"
            )

    def missing(self, store: TraceStore) -> list[Listed]:
        """Those that the folder lacks."""
        there = all_ended(store)
        return [cell for cell in self.cells if cell.file not in there]

    def check_whole(self, store: TraceStore) -> None:
        """Refuse a folder that lacks some of these cells.

        Raises:
            RunMismatchError: it was filled with others.
            ValueError: some are missing, with their names.
        """
        self.agree(store)
        if missing := self.missing(store):
            shown = ", ".join(cell.name for cell in missing[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise ValueError(
                f"{store.place} lacks {len(missing)} of {len(self.cells)} cells: {shown}{more}. Run the slices that "
                f"lack them again, or `stagewise run {quote(f'{store.place}/config.yaml')}`, which computes the rest"
            )


def collect(source: Path, root: Path) -> None:
    """Copy what another folder of the same run holds and this one does not; each file whole or not at all.

    Raises:
        RunFolderError: one of them is no run folder.
        RunMismatchError: they are of different runs.
    """
    other = TraceStore.read_only(source)
    cells = CellList.read(other)
    if cells is None:
        raise RunFolderError(f"{source} holds no slice of a run: it has no {_FILE}")
    if not (root / "identity.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        for name in _OF_RUN:
            _copy(source / name, root / name)
    store = TraceStore.read_only(root)
    check_identity(root, store.identity, other.identity)
    cells.agree(store)
    for folder in ("cells", "kept"):
        (root / folder).mkdir(exist_ok=True)
        for name in other.names(folder):
            if (root / name).exists():
                check_alike(root / name, source / name)
            else:
                _copy(source / name, root / name)


def _copy(source: Path, target: Path) -> None:
    with explain_write(target.parent), whole(target) as partial:
        shutil.copyfile(source, partial)
