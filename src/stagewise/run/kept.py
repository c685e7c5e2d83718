"""Results of single checkpoints, kept as they come, so that a killed run goes on where it was.

One file for each, under the hash of all that decides its numbers: whole or absent, and never that of another run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import xarray as xr

from stagewise.content import content_digest
from stagewise.run.folder import dataset_from_json, dataset_to_json
from stagewise.task import Task
from stagewise.traces.files import RunFolderError, explain_read, explain_write, write_text
from stagewise.traces.store import RunMismatchError, TraceStore

_REFUSED = ".refused"


class RefusedError(ValueError):
    """A result that does not exist: the reason is kept in its place, until the run is begun again."""


class Kept:
    """The results that a run folder keeps.

    Args:
        store: of the run; its identity is part of every hash.
        task: the task; its labels are, too.
    """

    def __init__(self, store: TraceStore, task: Task) -> None:
        self._root = store.root
        labels = content_digest((task.train_groups, task.query_groups))
        self._cause = [*(f"{name}={value}" for name, value in sorted(store.identity.items())), labels]

    def file(self, name: str, cause: str) -> str:
        """Where a result is kept, in the run folder."""
        key = hashlib.sha256("\0".join([*self._cause, name, cause]).encode()).hexdigest()
        return f"kept/{name.replace(' ', '-')}-{key[:32]}.json"

    def get(self, name: str, cause: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """What is kept, else what ``compute`` gives, which is kept then.

        Args:
            name: of the estimator.
            cause: what the numbers depend on beside the task: the checkpoint, settings.
            compute: may raise; of a ``ValueError`` the reason is kept.

        Raises:
            RefusedError: ``compute`` raised a ``ValueError``, now or before.
            RunFolderError: the file is damaged, or cannot be written.
        """
        file = self.file(name, cause)
        path, refused = self._root / file, self._root / f"{file}{_REFUSED}"
        if path.exists():
            with explain_read(self._root, file):
                return dataset_from_json(json.loads(path.read_text(encoding="utf-8")))
        if refused.exists():
            with explain_read(self._root, refused.name):
                raise RefusedError(refused.read_text(encoding="utf-8"))
        try:
            result = compute()
        except (RunFolderError, RunMismatchError):
            raise
        except ValueError as error:
            self._write(refused, str(error))
            raise RefusedError(str(error)) from error
        self._write(path, json.dumps(dataset_to_json(result)))
        return result

    def forget_refusals(self) -> None:
        """What could not be computed is tried again: call it where a run begins."""
        with explain_write(self._root):
            for refused in (self._root / "kept").glob(f"*{_REFUSED}"):
                refused.unlink(missing_ok=True)

    def _write(self, path: Path, text: str) -> None:
        with explain_write(self._root):
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)


def ended(root: Path, file: str) -> bool:
    """Whether a result, or the reason why there is none, is kept under this name."""
    return (root / file).exists() or (root / f"{file}{_REFUSED}").exists()
