"""Who may work in a run folder: one run, or any number of slices of one.

A lock is the system's own (``flock``) on a small file, and dies with its process. On network file systems it holds
between machines where they are mounted with locks, as NFS 4 is; where they are not, what is relied on is that a file
is renamed in one instant: work may then be done twice, and is never torn.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from stagewise.traces.files import RunFolderError, explain_write, write_text

_ALONE, _HOLDER = ".lock", "-holder"
_MADE = 30.0  # seconds in which a folder is made
_MOMENT = 3.0  # seconds that others take who look whether they may begin


class RunLockedError(RuntimeError):
    """Another process is working in the run folder; the message names it."""


@contextmanager
def run_lock(root: Path) -> Iterator[None]:
    """Hold a run folder alone.

    Raises:
        RunLockedError: another process works in it.
        RunFolderError: the folder cannot be written.
    """
    with _held(root, _ALONE):
        for other in sorted(root.glob(f"{_ALONE}-slice-*")):
            if not other.name.endswith(_HOLDER):
                _check_free(root, other.name)
        yield


@contextmanager
def slice_lock(root: Path, name: str) -> Iterator[None]:
    """Hold a slice of a run; others may hold other slices.

    Raises:
        RunLockedError: another process works on this slice, or on the whole run.
        RunFolderError: the folder cannot be written.
    """
    with _held(root, f"{_ALONE}-{name}"):
        _check_free(root, _ALONE, _MOMENT)
        yield


def making_lock(root: Path) -> AbstractContextManager[None]:
    """Hold a run folder that is being made, after whoever is making it; raises as :func:`run_lock`."""
    return _held(root, _ALONE, _MADE)


def holders(root: Path) -> list[str]:
    """Who works in a run folder, by what their locks say; a lock that nobody has named himself for is not touched."""
    found = []
    for holder in sorted(root.glob(f"{_ALONE}*{_HOLDER}")):
        name = holder.name.removesuffix(_HOLDER)
        try:
            _check_free(root, name)  # of a process that was killed
        except (RunLockedError, RunFolderError):
            found.append(f"{name.removeprefix(_ALONE).strip('-') or 'the whole run'}: {_name_holder(holder)}")
    return found


def _check_free(root: Path, name: str, patience: float = 0) -> None:
    """Refuse where somebody holds this lock."""
    _acquired(root, name, patience).release()


@contextmanager
def _held(root: Path, name: str, patience: float = 0) -> Iterator[None]:
    holder, lock = root / f"{name}{_HOLDER}", _acquired(root, name, patience)
    try:
        with explain_write(root):
            write_text(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _acquired(root: Path, name: str, patience: float) -> BaseFileLock:
    lock = FileLock(root / name, timeout=patience)
    try:
        with explain_write(root):
            lock.acquire()
    except Timeout:
        raise RunLockedError(
            f"{root} is in use by {_name_holder(root / f'{name}{_HOLDER}')}; wait until it has finished or stop it, or "
            "choose another folder (out=...)"
        ) from None
    return lock


def _name_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
