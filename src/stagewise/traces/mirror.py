"""Where a run folder is worked in: the folder itself, or a mirror on this machine of one on an object store.

A mirror holds nothing of its own: it can be deleted between two runs, and what differs from the store is fetched anew.
Its place is found anew by every process, so that a store of traces can be sent to other machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stagewise.traces.files import RunFolderError, explain_write, write_text
from stagewise.traces.lock import RunLockedError, holders, run_lock
from stagewise.traces.remote import Remote

_ONLY_SHOWN = ("explorer", "figures", "report.html")  # and never read again, but by a person who asks for it


def place_of(root: str | Path | Remote) -> Path | Remote:
    """A folder of this machine, or the url of one on an object store.

    Raises:
        ValueError: it is a url that cannot be used, or one that was made a Path.
    """
    if isinstance(root, Remote):
        return root
    if isinstance(root, str):
        return Remote.parse(root) if "://" in root else Path(root)
    if mangled := re.match(r"([a-z][a-z0-9+]+):[/\\]", str(root)):
        raise ValueError(f"{root} is a Path, which cannot hold a url; give it as text: '{mangled[1]}://...'")
    return root


def mirror(remote: Remote) -> Path:
    """The folder of this machine for a run folder on an object store, below ``$STAGEWISE_CACHE`` if that is set."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagewise"
    cache = Path(os.environ.get("STAGEWISE_CACHE") or usual).expanduser().absolute()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", remote.url.rpartition("/")[2])[:40]
    return cache / "runs" / f"{name}-{hashlib.sha256(remote.url.encode()).hexdigest()[:16]}"


def mirror_of(remote: Remote, identity: str) -> Path:
    """The mirror, made the folder of the run with this identity; what it holds of another is removed.

    Raises:
        RunLockedError: another run works in it.
        RunFolderError: it cannot be written.
    """
    root = mirror(remote)
    path = root / "identity.json"
    with explain_write(root):
        root.mkdir(parents=True, exist_ok=True)
        others = [entry for entry in root.iterdir() if not entry.name.startswith(".")]  # before looking whose they are
        if not (path.is_file() and _same(path.read_text(encoding="utf-8"), identity)):
            if others:
                with run_lock(root):
                    for entry in others:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_text(path, identity)
        (root / "cells").mkdir(exist_ok=True)
    return root


def _same(text: str, identity: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(identity))
    except ValueError:
        return False


def local(folder: str | Path, *names: str) -> Path:
    """A folder of this machine to read in: the run folder, or its mirror with these names as the store has them now.

    Raises:
        RunFolderError: there is no run folder at the url, or the store cannot be read.
        FileNotFoundError: the store has not all of the names.
    """
    place = place_of(folder)
    if isinstance(place, Path):
        return place
    root = existing(place)
    if missing := {*names} - fetch(place, root, names):
        raise FileNotFoundError(f"{place} has no {', '.join(sorted(missing))} yet; write it with `stagewise run`")
    return root


def existing(remote: Remote) -> Path:
    """The mirror of a run folder that is there.

    Raises:
        RunFolderError: there is none, or the store cannot be read.
    """
    identity = remote.identity()
    if identity is None:
        raise RunFolderError(f"{remote} is no run folder: no run was begun there")
    return mirror_of(remote, identity)


def local_file(path: str) -> Path:
    """A file of this machine, or that of a run folder on an object store, fetched.

    Raises:
        RunFolderError: there is no such run folder, or the store cannot be read.
        FileNotFoundError: there is no such file in it.
    """
    folder, _, name = path.rpartition("/")
    return local(folder, name) / name if "://" in path else Path(path)


def fetch(remote: Remote, root: Path, names: Sequence[str]) -> set[str]:
    """Bring names into the mirror to be read; what a run has written that works in it stays, and is not older.

    Returns:
        Those that are there.

    Raises:
        RunFolderError: as :meth:`Remote.fetch`.
    """
    newer = {name for name in names if (root / name).exists()} if holders(root) else set()
    return newer | remote.fetch(root, [name for name in names if name not in newer])


def pull(remote: Remote, root: Path) -> None:
    """Bring all but the cells that a run reads of its folder into the mirror, many files at once.

    Raises:
        RunFolderError: a content is damaged, or the store cannot be read.
    """
    names = [name for name in remote.names() if not name.startswith(("cells/", *_ONLY_SHOWN))]
    fetch(remote, root, names)
    gone = [path for path in (root / "results", *root.glob("imported/*.json")) if path.exists()]
    gone = [path for path in gone if path.relative_to(root).as_posix() not in names]
    if gone:
        with suppress(RunLockedError), run_lock(root):  # or they are on their way to the store
            for path in gone:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
