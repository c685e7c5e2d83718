"""A folder as one file and back: the same bits whenever and wherever its files are the same."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stagewise.traces.files import beside, fsync


@contextmanager
def packed(path: Path) -> Iterator[Path]:
    """A folder as a zip without compression, names and times of the machine; a file as it is."""
    if not path.is_dir():
        yield path
        return
    archive = beside(path)
    try:
        with zipfile.ZipFile(archive, "w") as file:
            for member in sorted(member for member in path.rglob("*") if member.is_file()):
                entry = zipfile.ZipInfo(member.relative_to(path).as_posix())
                with member.open("rb") as source, file.open(entry, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, 2**20)
        yield archive
    finally:
        archive.unlink(missing_ok=True)


def unpack_folder(archive: Path, target: Path) -> None:
    """Put what :func:`packed` made of a folder in the place of an older one."""
    partial = beside(target)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
