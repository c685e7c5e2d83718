"""A user's own code: the file or package that defines a task, and whether an error came out of it.

A file is imported under a name that nothing else has, so that it may be called ``torch.py``, and so that two files of
one name stay apart. The folder it lies in goes to the end of ``sys.path``: its neighbours can be imported, and take the
place of nothing that is installed. A file inside a package is imported as a part of it, so that it may use relative
imports.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from stagewise.memory import out_of_memory
from stagewise.run.config import ConfigError, nearest
from stagewise.run.places import is_module
from stagewise.task import Task

_PREFIX = "_stagewise_"
_PACKAGE = Path(__file__).parents[1]
_own: set[Path] = set()
"""The folders of users' code so far."""
_added: list[str] = []
"""Those that are on ``sys.path`` because of their task file, the latest first."""


def load_task(reference: str, arguments: Mapping[str, Any]) -> Task:
    """Import ``file.py:function`` or ``module:function`` and call it.

    Raises:
        ConfigError: it cannot be found, does not return a Task, or raises an error, with its place.
    """
    module_name, separator, name = reference.rpartition(":")
    if not separator:
        raise ConfigError(f"task must be 'file.py:function' or 'module:function', got {reference!r}")
    try:
        module = _imported(module_name)
        build = getattr(module, name, None)
        task = None if build is None else build(**arguments)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        place = next(iter(_own_places(error)), reference)
        raise ConfigError(f"task: {place}: {in_one_line(error)}") from error
    if build is None:
        raise ConfigError(f"task: {module_name} has no function {name!r}{nearest(name, dir(module))}")
    if not isinstance(task, Task):
        raise ConfigError(f"task: {reference} returned {type(task).__name__}, expected a stagewise.Task")
    return task


def place_in_task_file(error: BaseException) -> str | None:
    """``file:line`` if an error was raised by the user's own code, here or in a worker; None if by stagewise."""
    places = _own_places(error, stop_at_stagewise=True)
    return places[0] if places else None


def in_one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _imported(name: str) -> ModuleType:
    folder, dotted = _located(name)
    if folder is None:
        return _installed(name)
    _make_neighbours_importable(folder)
    private = f"{_private_name(folder)}.{dotted}"
    sys.modules.pop(private, None)  # the file may have changed since
    importlib.invalidate_caches()
    return importlib.import_module(private)


def _installed(name: str) -> ModuleType:
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
        if spec is not None and spec.origin is not None:
            _own.add(Path(spec.origin).parent)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"task: there is no module {error.name!r} (importing {name!r}), neither installed nor beside the "
                "configuration"
            ) from error
        raise


def _located(name: str) -> tuple[Path | None, str]:
    """The folder that imports start from, and the dotted name from there; no folder for an installed module."""
    path = Path(name).absolute()
    if not name.endswith(".py"):
        return (None, name) if path.name == name or not is_module(path.parent, path.name) else (path.parent, path.name)
    if not path.is_file():
        raise ConfigError(f"task: there is no file {path}")
    if "." in path.stem:
        raise ConfigError(f"task: {path} cannot be imported: the name of a module has no dot; rename it")
    folder, dotted = path.parent, path.stem
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        folder, dotted = folder.parent, f"{folder.name}.{dotted}"
    return folder, dotted


def _make_neighbours_importable(folder: Path) -> None:
    """Put the folder behind all that is installed and before those of earlier task files."""
    _own.add(folder)
    if str(folder) in sys.path and str(folder) not in _added:
        return
    for earlier in [Path(known) for known in _added if known != str(folder)]:
        for name in _modules_in(folder):
            if _lies_in(sys.modules.get(name), earlier, name):  # another file of this name, of an earlier task
                for part in [part for part in sys.modules if f"{part}.".startswith(f"{name}.")]:
                    del sys.modules[part]
    sys.path[:] = [known for known in sys.path if known not in _added]
    _added[:] = [str(folder), *(known for known in _added if known != str(folder))]
    sys.path += _added


def _modules_in(folder: Path) -> list[str]:
    found = {module.name for module in pkgutil.iter_modules([str(folder)])}
    return [*found, *(child.name for child in folder.iterdir() if child.is_dir() and child.name not in found)]


def _lies_in(module: ModuleType | None, folder: Path, name: str) -> bool:
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", [])]
    return any(Path(place) in (folder / f"{name}.py", folder / name) for place in places)


def _private_name(folder: Path | str) -> str:
    return _PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:12]


class _PrivatePackages:
    """Finds a folder of ``sys.path`` by its private name, so that what is defined there can be unpickled too."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _target: Any = None) -> ModuleSpec | None:
        if path is not None or not name.startswith(_PREFIX):
            return None
        for folder in sys.path:
            if _private_name(folder) == name:
                spec = ModuleSpec(name, None, is_package=True)
                spec.submodule_search_locations = [folder]
                return spec
        return None


sys.meta_path.append(_PrivatePackages)


def _own_places(error: BaseException, stop_at_stagewise: bool = False) -> list[str]:
    """``file:line`` of the user's code that an error passed through, the deepest first."""
    remote = error.__cause__  # of a worker's error the traceback comes as text
    is_remote = type(remote).__name__ == "_RemoteTraceback"
    text = str(remote) if is_remote else "".join(traceback.format_exception(error, chain=False))
    places = []
    for file, line in reversed(re.findall(r'^  File "(.+?)", line (\d+)', text, re.MULTILINE)):
        if Path(file).is_relative_to(_PACKAGE):
            if stop_at_stagewise:
                break
        elif any(_is_own(Path(file), folder) for folder in _own):
            places.append(f"{file}:{line}")
    return places


def _is_own(file: Path, folder: Path) -> bool:
    """Whether a file lies below the folder, but not in an environment of installed packages that lies there too."""
    return file.is_relative_to(folder) and "site-packages" not in file.relative_to(folder).parts
