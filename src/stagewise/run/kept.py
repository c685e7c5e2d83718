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
from stagewise.traces.files import explain_read, explain_write, write_text
from stagewise.traces.store import TraceStore


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

    def get(self, name: str, cause: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """What is kept, else what ``compute`` gives, which is kept then.

        Args:
            name: of the estimator.
            cause: what the numbers depend on beside the task: the checkpoint, settings.
            compute: may raise; then nothing is kept.

        Raises:
            RunFolderError: the file is damaged, or cannot be written.
        """
        key = hashlib.sha256("\0".join([*self._cause, name, cause]).encode()).hexdigest()
        file = f"kept/{name.replace(' ', '-')}-{key[:32]}.json"
        path = self._store.root / file
        if self._store.has(file):
            with explain_read(self._store.root, file):
                return dataset_from_json(json.loads(path.read_text(encoding="utf-8")))
        result = compute()
        with explain_write(self._store.root):
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(dataset_to_json(result)))
        self._store.push(file)
        return result
