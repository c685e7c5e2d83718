"""Of which run a folder is: one hash per part its numbers depend on, so that a mismatch can name the part."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from stagewise.traces.files import RunFolderError, write_text
from stagewise.traces.remote import Remote

_FORMAT = "stagewise traces 3"


class RunMismatchError(ValueError):
    """The folder holds another run; the message names every part that differs."""


def write_identity(root: Path, identity: Mapping[str, str]) -> None:
    """Make ``root`` the folder of this run, in one instant."""
    write_text(root / "identity.json", identity_text(identity))


def identity_text(identity: Mapping[str, str]) -> str:
    """What stands in ``identity.json``."""
    return json.dumps({"format": _FORMAT, "identity": dict(identity)}, indent=1)


def read_identity(root: Path) -> dict[str, str]:
    """The identity of a run folder.

    Raises:
        RunFolderError: ``root`` is no run folder.
    """
    path = root / "identity.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        identity = {str(part): str(digest) for part, digest in content["identity"].items()}
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(f"{root} is no run folder: it has no identity.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} cannot be read as the identity of a run: {error!r}") from error
    if found != _FORMAT:
        raise RunFolderError(
            f"{root} has the format {found!r}, this version of stagewise reads {_FORMAT!r}; read it with the version "
            "that wrote it, or give this run another folder (out=...)"
        )
    return identity


def check_identity(root: Path | Remote, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Refuse a folder of another run.

    Raises:
        RunMismatchError: with every part that differs, is missing or is new.
    """
    lines = [_difference(part, stored.get(part), wanted.get(part)) for part in sorted({*stored, *wanted})]
    if differences := [line for line in lines if line]:
        raise RunMismatchError(
            f"{root} holds another run:\n" + "\n".join(differences) + "\nTheir traces must not be mixed: give this "
            "run another folder (out=...), or delete that one if it is no longer wanted"
        )


def _difference(part: str, stored: str | None, wanted: str | None) -> str:
    if stored == wanted:
        return ""
    if stored is None:
        return f"  {part}: new, the folder's run has none"
    if wanted is None:
        return f"  {part}: missing, the folder's run has it"
    return f"  {part}: differs (folder {_shown(stored)}, now {_shown(wanted)})"


def _shown(value: str) -> str:
    """The beginning of a hash; settings that are kept in words are shown whole."""
    return value[:12] if re.fullmatch("[0-9a-f]{16,}", value) else value
