"""One run at a time in a run folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stagewise.traces.files import explain_write, write_text


class RunLockedError(RuntimeError):
    """Another process is working in the run folder; the message names it."""


@contextmanager
def run_lock(root: Path) -> Iterator[None]:
    """Hold the lock of a run folder; it dies with its process.

    Raises:
        RunLockedError: another process holds it.
        RunFolderError: the folder cannot be written.
    """
    holder = root / ".lock-holder"
    lock = FileLock(root / ".lock", timeout=0)
    try:
        with explain_write(root):
            lock.acquire()
    except Timeout:
        raise RunLockedError(
            f"{root} is in use by {_name_holder(holder)}; wait until it has finished or stop it, or choose "
            "another folder (out=...)"
        ) from None
    try:
        with explain_write(root):
            write_text(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _name_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
