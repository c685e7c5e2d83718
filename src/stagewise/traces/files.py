"""Files that are either whole and on disk, or not there."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

PARTIAL = ".partial-"
"""Start of the name of whatever is not whole yet."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk without room."""


class RunFolderError(ValueError):
    """A folder that cannot be used as a run folder; the message names the folder and the reason."""


class SweptError(RuntimeError):
    """A run took a writer for dead and removed what it was writing. No ``ValueError``: it may be tried again."""


def beside(path: Path) -> Path:
    """A name in the same folder for what is not whole yet; no two writers get the same, on whatever machines."""
    return path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of ``path`` in one instant if nothing is raised.

    Raises:
        SweptError: somebody has removed it before it was whole.
    """
    partial = beside(path)
    try:
        yield partial
        try:
            fsync(partial)
            partial.replace(path)
        except FileNotFoundError:
            raise SweptError(f"{partial} was swept by another run before it was whole") from None
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write or replace a small file in one instant."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As :func:`write_text`."""
    with whole(path) as partial:
        partial.write_bytes(content)


def fsync(path: Path) -> None:
    """Bring one file or folder to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows can neither open nor flush a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_write(root: Path) -> Iterator[None]:
    """Turn what the system says while writing into an error that says what to do."""
    try:
        yield
    except Timeout:  # an OSError too, but about the lock
        raise
    except OSError as error:
        full = error.errno in DISK_FULL
        remedy = (
            "free some space and run again: what is complete is kept" if full else "choose another folder (out=...)"
        )
        raise RunFolderError(f"cannot write the run folder {root}: {error}; {remedy}") from error


@contextmanager
def explain_read(root: Path, what: str) -> Iterator[None]:
    """Turn damage that is met while reading cells into an error that says what to do.

    What is no damage of the folder is passed on: too little memory, or a system that does not let us read.
    """
    try:
        yield
    except (RunFolderError, MemoryError):
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise _damaged(root, what, error) from error
        raise RunFolderError(f"{root}: {what} cannot be read: {error}") from error
    except Exception as error:
        raise _damaged(root, what, error) from error


def _damaged(root: Path, what: str, error: Exception) -> RunFolderError:
    return RunFolderError(f"{root}: {what} cannot be read ({error}); delete it and run again to compute it anew")
