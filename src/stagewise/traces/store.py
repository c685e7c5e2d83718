"""The run folder: every cell of a run, complete or absent, never in between.

    root/identity.json              what the numbers depend on, one hash per part
    root/cells/<step>-<block>.zip   one cell, a zipped Zarr v3 group whose root attributes hold its key

A cell is written into a hidden file beside its place and renamed when it is whole and on disk. Killing a
writer at any moment leaves all complete cells as they were, plus at most one hidden file, which
:meth:`TraceStore.sweep` removes, and the chains that were under way, ``<step>-<block>.zip.underway``.

Of a run folder on an object store (:mod:`stagewise.traces.remote`) ``root`` is this machine's mirror. A cell is
complete when the store has it; what is read is fetched first.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stagewise.labels import Labels
from stagewise.memory import release
from stagewise.notebook import listed, table
from stagewise.traces.cells import Cell, Facts, check_cell, join_blocks, join_facts, pack, unpack
from stagewise.traces.files import PARTIAL, RunFolderError, explain_read, explain_write, whole, write_text
from stagewise.traces.identity import (
    RunMismatchError,
    check_identity,
    identity_text,
    read_identity,
    write_identity,
)
from stagewise.traces.lock import RunLockedError, making_lock, run_lock, slice_lock
from stagewise.traces.mirror import existing, fetch, mirror_of, place_of, pull
from stagewise.traces.remote import Remote
from stagewise.traces.underway import UnderwayFile
from stagewise.traces.zarr_tree import read_attrs, read_label, read_tree, write_tree

__all__ = ["Cell", "RunFolderError", "RunLockedError", "RunMismatchError", "TraceStore"]

_CELL_NAME = re.compile(r"(\d{8,})-(\d{4,})\.zip")

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TraceStore:
    """The cells of one run in one folder, made by :meth:`open` or :meth:`read_only`.

    It holds no open file, so it can be sent to worker processes, and workers may write at the same time.

    Attributes:
        root: the run folder; of one on an object store its mirror, on whichever machine this is.
        identity: one hash per part that the run's numbers depend on.
        writable: False if opened to be read only.
        remote: the run folder on an object store; None for one on this machine.

    Example:
        >>> import tempfile, torch, stagewise as sw
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> run = sw.Trajectory.from_checkpoints([start])
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = sw.sample(task, run, sw.LocalPosterior(window=10), out=folder.name, chains=8, draws=64)
        >>> again = sw.TraceStore.read_only(folder.name)
        >>> again.steps, again.writable
        ((0,), False)
        >>> folder.cleanup()
    """

    root: Path
    identity: Mapping[str, str]
    writable: bool = True
    remote: Remote | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.remote is not None:  # perhaps on another machine
            self.__dict__["root"] = mirror_of(self.remote, identity_text(self.identity))

    def _repr_html_(self) -> str:
        rows = [("folder", self.place), ("steps", listed(self.steps)), ("complete cells", len(self.blocks))]
        return table("TraceStore", rows)

    @classmethod
    def open(cls, root: str | Path | Remote, identity: Mapping[str, str], *, create: bool = True) -> TraceStore:
        """The run folder of this identity: a new one, or one that already holds some of its cells.

        Args:
            root: the run folder, or its url on an object store, e.g. ``"s3://bucket/runs/a"``.
            identity: one hash per part, e.g. ``{"model": ..., "training data": ..., "sampler": ...}``.
            create: make the folder if there is none.

        Raises:
            RunMismatchError: the folder holds a run of another identity.
            RunFolderError: there is no run folder and ``create`` is False, or it cannot be read or written.
            RunLockedError: another process is creating it right now.
        """
        place = place_of(root)
        if isinstance(place, Remote):
            mirrored = mirror_of(place, place.claim(identity_text(identity))) if create else existing(place)
            check_identity(place, read_identity(mirrored), identity)
            pull(place, mirrored)
            return cls(mirrored, dict(identity), remote=place)
        store = cls(place, dict(identity))
        if create:
            store._create()
        check_identity(store.root, read_identity(store.root), store.identity)
        return store

    @classmethod
    def read_only(cls, root: str | Path | Remote) -> TraceStore:
        """An existing run folder, or one on an object store by its url, whatever its identity.

        Raises:
            RunFolderError: ``root`` is no run folder.
        """
        place = place_of(root)
        if isinstance(place, Path):
            return cls(place, read_identity(place), writable=False)
        mirrored = existing(place)
        pull(place, mirrored)
        return cls(mirrored, read_identity(mirrored), writable=False, remote=place)

    @property
    def place(self) -> Path | Remote:
        """The run folder as the user named it."""
        return self.remote or self.root

    def has(self, *names: str) -> bool:
        """Whether all these are in the run folder, e.g. ``labels.json``. Those of an object store are fetched."""
        if self.remote is not None:
            bring = self.remote.fetch if self.writable else partial(fetch, self.remote)
            return bring(self.root, names) >= {*names}
        return all((self.root / name).exists() for name in names)

    def push(self, *names: str) -> None:
        """Bring files and folders that were written into ``root`` to the object store, if the run folder is on one.

        Raises:
            RunFolderError: the store cannot be written.
        """
        if self.remote is not None:
            for name in names:
                self.remote.put(self.root / name, name)

    def remove(self, *names: str) -> None:
        """Remove files, here and from the object store.

        Raises:
            RunFolderError: they cannot be removed.
        """
        with self._writing():
            if self.remote is not None:
                self.remote.remove(names)
            for name in names:
                (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder of the run folder, ascending; those under way are not among them."""
        if self.remote is not None:
            return self.remote.names(folder)
        files = (self.root / folder).glob("[!.]*")
        return sorted(f"{folder}/{file.name}" for file in files if file.suffix != ".underway")

    def lock(self, part: str | None = None) -> AbstractContextManager[None]:
        """Context that keeps other runs out of the folder. It refuses at once, and dies with its process.

        Args:
            part: name of the slice of the run that is worked on, beside others; default all of it.

        Raises:
            RunLockedError: another process holds the lock.
            RunFolderError: the folder cannot be written.
        """
        with self._writing():
            return run_lock(self.root) if part is None else slice_lock(self.root, part)

    def is_complete(self, cell: Cell) -> bool:
        """Whether the cell is in the store.

        Raises:
            RunMismatchError: a cell with another key stands in its place.
        """
        file = self._cells / cell.name
        if not self.has(f"cells/{cell.name}"):
            return False
        with explain_read(self.root, f"cells/{cell.name}"):
            key = read_label(file)["key"]
        if key != cell.key:
            raise RunMismatchError(
                f"{self.place} holds step {cell.step}, block {cell.block} under another key: something that "
                "decides its numbers has changed since, e.g. the weights of the checkpoint. Choose another "
                f"folder (out=...), or delete {self._shown(cell.name)} to compute it again"
            )
        return True

    def write(self, cell: Cell, tree: xr.DataTree, probe: Mapping[str, Sequence[float]] | None = None) -> None:
        """Write a cell: complete when this returns, absent if interrupted. Writing it again changes nothing.

        Args:
            cell: which.
            tree: what it holds, see :mod:`stagewise.traces.cells`.
            probe: numbers by which the task can be known again, see :meth:`evidence`.

        Raises:
            ValueError: the tree is not a cell, see :mod:`stagewise.traces.cells`.
            RunMismatchError: a cell with another key stands in its place.
            RunFolderError: the folder cannot be written.
            SweptError: another run has taken this writer for dead.
        """
        check_cell(tree)
        if self.is_complete(cell):
            return
        with self._writing():
            with whole(self._cells / cell.name) as partial:
                packed = pack(tree)
                write_tree(packed, partial, asdict(cell) | {"probe": dict(probe or {})})
                release(packed)
                if self.remote is not None:
                    self.remote.put(partial, f"cells/{cell.name}")
            self._underway(cell.name).unlink(missing_ok=True)

    def underway(self, cell: Cell) -> UnderwayFile:
        """Where the chains of a cell are kept until it is complete."""
        return UnderwayFile(self._underway(cell.name), cell.key)

    def sweep(self) -> None:
        """Remove what killed writers left behind. Call it under :meth:`lock`, before workers start."""
        with self._writing():
            for partial in (*self.root.glob(f"{PARTIAL}*"), *self.root.glob(f"*/{PARTIAL}*")):
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink(missing_ok=True)  # its writer may be alive, and be done with it by now
            for whole in self._files().values():
                self._underway(whole.name).unlink(missing_ok=True)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with at least one complete cell, ascending."""
        return tuple(sorted({step for step, _ in self._files()}))

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(step, block) of every complete cell, ascending."""
        return tuple(sorted(self._files()))

    def evidence(self, step: int, block: int) -> tuple[dict[str, list[float]], dict[str, Numbers]]:
        """By what the task of a cell can be known again, without its draws.

        Returns:
            The probe it was written with, and ``loss_anchor`` by data set.

        Raises:
            RunFolderError: the cell is damaged or is not there.
        """
        file = self._cells / Cell(step, block, "any").name
        self.has(f"cells/{file.name}")
        with explain_read(self.root, f"cells/{file.name}"):
            groups = {node.path.strip("/"): node.to_dataset() for node in read_tree(file, "loss_anchor").subtree}
            anchors = {path: group["loss_anchor"].values for path, group in groups.items() if "loss_anchor" in group}
            return read_label(file)["probe"], anchors

    def load(self, step: int) -> xr.DataTree:
        """All chains of a step, in memory: its complete blocks one after the other along ``chain``.

        The root attributes are the facts on which the blocks agree.

        Raises:
            KeyError: the store holds nothing of this step.
            RunFolderError: a cell is damaged, or the blocks do not fit together.
        """
        trees = []
        for file in self._blocks(step):
            with explain_read(self.root, f"cells/{file.name}"):
                trees.append(read_tree(file))
                check_cell(trees[-1])
        # Joined as they are: chains of all blocks are relative to one and the same anchor.
        with self._explain_blocks(step):
            joined = join_blocks(trees)
            tree = unpack(joined)
        for packed in (*trees, joined):
            release(packed)
        return tree

    def attrs(self, step: int) -> Facts:
        """The facts of a step, without reading its traces; raises like :meth:`load`."""
        facts = []
        for file in self._blocks(step):
            with explain_read(self.root, f"cells/{file.name}"):
                facts.append(read_attrs(file))
        with self._explain_blocks(step):
            return join_facts(facts)

    def write_labels(self, train: Labels | None, queries: Mapping[str, Labels | None]) -> None:
        """Keep the group labels beside the traces; they decide no traced number and may change between runs.

        Args:
            train: labels of the traced losses of the candidates ``(sample,)`` or ``(sample, token)``, or one row
                ``(1, token)`` for all samples; None for none.
            queries: the same of each query set, by name.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        with self._writing():
            write_text(self.root / "labels.json", json.dumps(label_words(train, queries)))
            self.push("labels.json")

    @property
    def labels(self) -> dict[str, Any]:
        """``{"train": labels or None, "queries": {name: labels or None}}`` as written, empty where none were kept."""
        path = self.root / "labels.json"
        if not self.has("labels.json"):
            return {"train": None, "queries": {}}
        with explain_read(self.root, "labels.json"):
            labels: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return labels

    @property
    def _cells(self) -> Path:
        return self.root / "cells"

    def _underway(self, name: str) -> Path:
        return self._cells / f"{name}.underway"

    def _create(self) -> None:
        identity = self.root / "identity.json"
        with self._writing():
            if identity.exists():
                return
            self._cells.mkdir(parents=True, exist_ok=True)
        with making_lock(self.root), self._writing():
            if identity.exists():
                return
            if self._files():
                raise RunFolderError(f"{self.root} holds cells but no identity.json: nobody knows of which run")
            write_identity(self.root, self.identity)

    def _shown(self, name: str) -> str:
        return f"{self.root}/cells/{name}" if self.remote is None else self.remote.shown(f"cells/{name}")

    def _files(self) -> dict[tuple[int, int], Path]:
        if self.remote is not None:
            files = [self.root / name for name in self.remote.names("cells")]
        else:
            files = list(self._cells.iterdir()) if self._cells.is_dir() else []
        matches = [(file, _CELL_NAME.fullmatch(file.name)) for file in files]
        return {(int(match[1]), int(match[2])): file for file, match in matches if match}

    def _blocks(self, step: int) -> list[Path]:
        files = self._files()
        blocks = [files[cell] for cell in sorted(files) if cell[0] == step]
        if not blocks:
            raise KeyError(f"{self.place} holds no traces of step {step}; it holds {list(self.steps)}")
        self.has(*(f"cells/{file.name}" for file in blocks))
        return blocks

    @contextmanager
    def _explain_blocks(self, step: int) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise RunFolderError(
                f"{self.place}: the blocks of step {step} are not of one run ({error}); give each run a folder of its "
                f"own (out=...), or delete those of this step that are no longer wanted: cells/{step:08d}-*"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if not self.writable:
            raise RunFolderError(f"{self.root} was opened to be read only; use TraceStore.open to write")
        with explain_write(self.root):
            yield


def label_words(train: Labels | None, queries: Mapping[str, Labels | None]) -> dict[str, Any]:
    """Labels as :attr:`TraceStore.labels` gives them back."""
    return {"train": _words(train), "queries": {name: _words(words) for name, words in queries.items()}}


def _words(labels: Labels | None) -> list[str] | None:
    return None if labels is None else np.asarray(labels).astype(str).tolist()
