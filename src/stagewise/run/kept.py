"""Results of single checkpoints, kept as they come, so that a killed run goes on where it was.

One file for each, under the hash of all that decides its numbers: whole or absent, and never that of another run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import xarray as xr

from stagewise.content import content_digest
from stagewise.run.folder import dataset_from_json, dataset_to_json
from stagewise.task import Task
from stagewise.traces.files import RunFolderError, explain_read, explain_write, write_text
from stagewise.traces.store import RunMismatchError, TraceStore

_FOLDER, _REFUSED = "kept", ".refused"


class RefusedError(ValueError):
    """A result that does not exist: the reason is kept in its place, until the run is begun again."""


class Kept:
    """The results that a run folder keeps.

    Args:
        store: of the run; its identity is part of every hash.
        task: the task; its labels are, too.
    """

    def __init__(self, store: TraceStore, task: Task) -> None:
        self._store = store
        labels = content_digest((task.train_groups, task.query_groups))
        self._cause = [*(f"{name}={value}" for name, value in sorted(store.identity.items())), labels]

    def file(self, name: str, cause: str) -> str:
        """Where a result is kept, in the run folder."""
        key = hashlib.sha256("\0".join([*self._cause, name, cause]).encode()).hexdigest()
        return f"{_FOLDER}/{name.replace(' ', '-')}-{key[:32]}.json"

    @property
    def place(self) -> object:
        """The run folder as the user named it."""
        return self._store.place

    def has(self, name: str, cause: str) -> bool:
        """Whether a result is kept."""
        return self._store.has(self.file(name, cause))

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
        if self.has(name, cause):
            with explain_read(self._store.root, file):
                return dataset_from_json(json.loads(self._read(file)))
        if self._store.has(refused := f"{file}{_REFUSED}"):
            with explain_read(self._store.root, refused):
                reason = self._read(refused)
            raise RefusedError(reason)
        try:
            result = compute()
        except (RunFolderError, RunMismatchError):
            raise
        except ValueError as error:
            self._write(refused, str(error))
            raise RefusedError(str(error)) from error
        self._write(file, json.dumps(dataset_to_json(result)))
        return result

    def forget_refusals(self) -> None:
        """What could not be computed is tried again: call it where a run begins."""
        self._store.remove(*(name for name in self._store.names(_FOLDER) if name.endswith(_REFUSED)))

    def _read(self, file: str) -> str:
        return (self._store.root / file).read_text(encoding="utf-8")

    def _write(self, file: str, text: str) -> None:
        path = self._store.root / file
        with explain_write(self._store.root):
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
        self._store.push(file)


def ended(store: TraceStore, file: str) -> bool:
    """Whether a result, or the reason why there is none, is kept under this name."""
    return store.has(file) or store.has(f"{file}{_REFUSED}")


def all_ended(store: TraceStore) -> set[str]:
    """The names of all cells and results in a store, and of those that have a reason why there is none."""
    names = (name for folder in ("cells", _FOLDER) for name in store.names(folder))
    return {name.removesuffix(_REFUSED) for name in names}
