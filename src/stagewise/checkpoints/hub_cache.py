"""The cache of the Hugging Face Hub on this machine, as its files lie; no network and no client is needed.

``models--org--name/`` holds ``refs/<revision>``, each a file with the hash of a commit, and ``snapshots/<hash>/`` with
the files of that commit, which are links into ``blobs/``.
"""

from __future__ import annotations

import re
from pathlib import Path

from stagewise.checkpoint import CheckpointError

_HASH = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"models--(.+)")


def repository_folder(cache: Path, repository: str) -> Path:
    """Where the cache keeps a repository of models."""
    return cache / f"models--{repository.replace('/', '--')}"


def cached_revisions(folder: Path) -> dict[str, str]:
    """The revisions that the folder of a repository knows, and their commits."""
    refs = folder / "refs"
    files = [file for file in sorted(refs.rglob("*")) if file.is_file()]
    return {file.relative_to(refs).as_posix(): file.read_text(encoding="utf-8").strip() for file in files}


def refuse_hub_cache(path: Path) -> None:
    """Refuse to look for steps where folders are named by hashes, whose digits would be taken for them.

    Raises:
        CheckpointError: the path is in the cache of a repository, or holds folders named by hashes.
    """
    here = path.absolute()
    inside = [folder for folder in (here, *here.parents) if _REPOSITORY.fullmatch(folder.name) and _is_cache(folder)]
    if not inside and not any(_HASH.fullmatch(entry.name) for entry in path.iterdir()):
        return
    folder = inside[0] if inside else here.parent
    known = sorted(cached_revisions(folder), key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    listed = f" (here: {', '.join(known[:4])}{', ...' if len(known) > 4 else ''})" if known else ""
    found = _REPOSITORY.fullmatch(folder.name)
    name = found[1].replace("--", "/", 1) if found else "org/name"
    raise CheckpointError(
        f"{path} is the cache of the Hugging Face Hub, whose folders are named by the hashes of commits and not by "
        f"steps; use Trajectory.from_hub({name!r}, local_files_only=True), which reads the revisions{listed}"
    )


def _is_cache(folder: Path) -> bool:
    return (folder / "snapshots").is_dir()
