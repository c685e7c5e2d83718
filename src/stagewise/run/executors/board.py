"""A folder in which jobs tell of their cells, for a driver that may not be there when they do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from stagewise.run.executors.base import Told
from stagewise.traces.files import PARTIAL, explain_read, explain_write, write_bytes, write_text

_JOBS = "jobs.json"


@dataclass(frozen=True)
class Board:
    """What jobs have said of the cells that they began, a file for each.

    Attributes:
        root: a folder of this run's alone, which jobs and driver share. Errors in it are pickled: it must be nobody
            else's.
    """

    root: Path

    def tell(self, name: str, told: Told) -> None:
        """Say of the cell of this name how it ended."""
        with explain_write(self.root):
            self._said.mkdir(parents=True, exist_ok=True)
            write_bytes(self._said / name, pickle.dumps(tuple(told)))

    def told(self, names: Collection[str]) -> dict[str, Told]:
        """What was said of these cells."""
        if not self._said.is_dir():
            return {}
        # A folder that is listed anew is not the one that a network file system remembers.
        files = [file for file in self._said.iterdir() if not file.name.startswith(PARTIAL) and file.name in names]
        found = {}
        for file in files:
            with explain_read(self.root, file.name):
                found[file.name] = Told(*pickle.loads(file.read_bytes()))
        return found

    def begin(self, name: str) -> None:
        """Say that the cell of this name is under way."""
        with explain_write(self.root):
            self._begun.mkdir(parents=True, exist_ok=True)
            (self._begun / name).touch()

    def begun(self, names: Collection[str]) -> set[str]:
        """Those of these cells that were said to be under way, whether they have ended or not."""
        return {file.name for file in self._begun.iterdir()} & {*names} if self._begun.is_dir() else set()

    def forget(self, names: Collection[str]) -> None:
        """What was said of these cells, and that they were begun."""
        for name in names:
            (self._said / name).unlink(missing_ok=True)
            (self._begun / name).unlink(missing_ok=True)

    def note_jobs(self, jobs: Mapping[str, Collection[str]]) -> None:
        """Remember which jobs there are, and the names of the cells of each."""
        with explain_write(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            write_text(self.root / _JOBS, json.dumps({job: sorted(names) for job, names in jobs.items()}))

    def noted_jobs(self) -> dict[str, set[str]]:
        """The jobs that were remembered last."""
        path = self.root / _JOBS
        if not path.exists():
            return {}
        with explain_read(self.root, _JOBS):
            return {str(job): set(names) for job, names in json.loads(path.read_text(encoding="utf-8")).items()}

    @property
    def _begun(self) -> Path:
        return self.root / "begun"

    @property
    def _said(self) -> Path:
        return self.root / "said"
