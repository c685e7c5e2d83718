"""Where the files of a configuration are, and how they are written down so that a folder can be moved."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def expanded(text: str) -> str:
    """A path with ``~``, ``$VAR`` and ``${VAR}`` put in; ``$$`` is a dollar sign.

    Raises:
        ValueError: a variable is not set, or a user has no home folder.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1].strip("{}")
        if name != "$" and not os.environ.get(name):
            raise ValueError(f"the variable {name} is not set; set it, or write $$ for a dollar sign")
        return "$" if name == "$" else os.environ[name]

    path = os.path.expanduser(re.sub(r"\$(\$|\w+|\{[^{}]*\})", value, text))
    if path.startswith("~"):
        raise ValueError(f"there is no home folder {path.partition('/')[0]}; write ./~ for a folder of that name")
    return path


def placed(path: str | Path, folders: Sequence[Path]) -> Path:
    """The path in the first of the folders that has it; in the first folder if none has."""
    places = [Path(os.path.normpath(folder / path)) for folder in folders]
    return next((place for place in places if place.exists()), places[0])


def task_place(reference: str, folders: Sequence[Path]) -> str:
    """A task's reference with the absolute place of its file, or of its module if one of the folders has it."""
    module, _, function = reference.rpartition(":")
    if module.endswith(".py"):
        return f"{placed(module, folders)}:{function}"
    for folder in folders if module else ():
        place = Path(os.path.normpath(folder / module))
        if is_module(place.parent, place.name):
            return f"{place}:{function}"
    return reference


def is_module(folder: Path, dotted: str) -> bool:
    """Whether ``package.module`` lies in the folder."""
    *parents, name = dotted.split(".")
    place = folder.joinpath(*parents)
    return (place / f"{name}.py").is_file() or (place / name / "__init__.py").is_file()


def portable(path: str | Path, folder: Path | None) -> str:
    """A path as it is written into ``folder``: relative to it if it lies in it, beside it or one level further up.

    What belongs together is moved together; what lies far away stays where it is, as all does for no folder.
    """
    target = Path(os.path.abspath(path))
    near = folder is not None and target.is_relative_to(folder.parent.parent)
    text = Path(os.path.relpath(target, folder) if near else target).as_posix().replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def portable_task(reference: str, folder: Path | None) -> str:
    """The same for the reference of a task, unless it names an installed module."""
    module, _, function = reference.rpartition(":")
    is_path = module.endswith(".py") or os.path.basename(module) != module
    return f"{portable(module, folder)}:{function}" if is_path else reference.replace("$", "$$")
