"""A run folder on an object store: whole contents under their hashes, and last of all a marker that says what is there.

    url/objects/<sha256>/<file>    the content of a file, or of a folder as one zip; never changed
    url/complete/<name>            the marker of ``name``: size and sha256 of its content
    url/identity/<sha256>          of which run it is: the text of identity.json under its hash

What has no marker does not exist. It is written after its content, in one request: whenever a writer is killed, a name
is absent, or as it was before, or as it is to be. What is relied on is what S3, Google Cloud Storage and Azure
promise: an object appears as a whole, and who reads or lists after a write sees it.

Machines work in a folder of their own, :mod:`stagewise.traces.mirror`, from which and to which files are copied here.
Credentials are those that fsspec finds in the environment, never part of a url.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewise.traces.archive import packed, unpack_folder
from stagewise.traces.files import DISK_FULL, RunFolderError, beside, explain_write, fsync
from stagewise.traces.marker import Marker

_MARKERS, _IDENTITIES = "complete", "identity"
_PACKAGES = {"s3": "'stagewise[store]'", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_LARGEST = 2**24  # bytes of a marker or an identity
_NEVER_CHANGED = ("cells/", "kept/")
_compared: set[tuple[str, Path]] = set()  # which of these this process has held against their markers


@dataclass(frozen=True)
class Remote:
    """A run folder on an object store. It holds no connection and no credentials, so it can be sent to workers.

    Attributes:
        url: such as ``s3://bucket/runs/a``, see :meth:`parse`.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @classmethod
    def parse(cls, text: str) -> Remote:
        """The run folder at a url; nothing is looked up.

        Raises:
            ValueError: it is no such url, or carries a password or a signature; then it is not repeated.
        """
        protocol, _, path = text.partition("://")
        if re.search(r"[?#]|::", text) or re.search(":.*@", path):
            raise ValueError(
                f"the url ({protocol}://...) must not carry a password, a signature or options: it is written into "
                "the run folder; give the bare url, and credentials in the environment"
            )
        path = path.rstrip("/")
        parts = path.removeprefix("/").split("/")
        if (
            not re.fullmatch("[a-z][a-z0-9+]+", protocol)
            or len(parts) < 2
            or {"", ".", ".."} & {*parts}
            or re.search(r"[*\[\]\\]", path)
        ):
            raise ValueError(f"expected the url of a folder in a bucket, e.g. s3://bucket/runs/a, got {text!r}")
        return cls(f"{protocol}://{path}")

    def shown(self, name: str) -> str:
        """What to delete for ``name`` not to be there."""
        return f"{self}/{_MARKERS}/{name}"

    def names(self, folder: str = "") -> list[str]:
        """All names that are complete, or those of a folder, ascending.

        Raises:
            RunFolderError: the store cannot be read.
        """
        with self._reached("read") as (files, base):
            found = files.find(f"{base}/{_MARKERS}/{folder}".rstrip("/"))
        return sorted(path.partition(f"{base}/{_MARKERS}/")[2] for path in found)

    def markers(self, names: Sequence[str]) -> dict[str, Marker]:
        """The markers of those of the names that are complete.

        Raises:
            RunFolderError: the store cannot be read.
        """
        texts = self._texts([f"{_MARKERS}/{name}" for name in names])
        found = {name: Marker.parse(text) for name, text in zip(names, texts, strict=True)}
        return {name: marker for name, marker in found.items() if marker is not None}

    def put(self, path: Path, name: str) -> None:
        """Make a file, or a folder with all that is in it, the content of ``name``: complete when this returns.

        Raises:
            RunFolderError: the store cannot be written.
        """
        with packed(path) as file:
            marker = Marker.of(file, path.is_dir())
            if self.markers([name]).get(name) == marker:
                return
            with self._reached("write") as (files, base):
                files.put_file(str(file), f"{base}/{marker.place(name)}")
                files.pipe_file(f"{base}/{_MARKERS}/{name}", marker.text())

    def remove(self, names: Sequence[str]) -> None:
        """Take away the markers of those of the names that are complete: then they are not there.

        Raises:
            RunFolderError: the store cannot be written.
        """
        there = self.markers(names)
        with self._reached("write") as (files, base):
            for name in there:
                files.rm_file(f"{base}/{_MARKERS}/{name}")

    def fetch(self, root: Path, names: Sequence[str]) -> set[str]:
        """Bring names into a folder as they are in the store; what is there already as it should be stays.

        Returns:
            Those that the store has.

        Raises:
            RunFolderError: a content is missing or not what its marker says, or the store or the folder cannot be used.
        """
        known = {name for name in names if (self.url, root / name) in _compared and (root / name).exists()}
        markers = self.markers([name for name in names if name not in known])
        with explain_write(root):
            self._bring(root, {name: marker for name, marker in markers.items() if not marker.fits(root / name)})
        _compared.update((self.url, root / name) for name in markers if name.startswith(_NEVER_CHANGED))
        return known | set(markers)

    def identity(self) -> str | None:
        """The text of ``identity.json``; None if no run was begun there.

        Raises:
            RunFolderError: two runs were begun there at the same time, or the store cannot be read.
        """
        with self._reached("read") as (files, base):
            found = sorted(path.rpartition("/")[2] for path in files.find(f"{base}/{_IDENTITIES}"))
        if len(found) > 1:
            raise RunFolderError(
                f"{self} was begun by {len(found)} different runs at the same time; give each a url of its own "
                f"(out=...), and delete {self}, or of {self}/{_IDENTITIES} all but the one that it is to belong to"
            )
        text = self._texts([f"{_IDENTITIES}/{found[0]}"])[0] if found else None
        if text is not None and hashlib.sha256(text).hexdigest() != found[0]:
            raise RunFolderError(
                f"{self}/{_IDENTITIES}/{found[0]} is damaged; delete it, or the run if it is not known"
            )
        return None if text is None else text.decode("utf-8")

    def claim(self, text: str) -> str:
        """Begin a run there if none was begun; the identity that it has then, which may be another's.

        Of two that begin at once each writes first and then looks: the later one sees both. So two different runs
        never both go on, whatever the store knows of locks.

        Raises:
            RunFolderError: as :meth:`identity`, or the store cannot be written.
        """
        if (there := self.identity()) is not None:
            return there
        content = text.encode("utf-8")
        with self._reached("write") as (files, base):
            files.pipe_file(f"{base}/{_IDENTITIES}/{hashlib.sha256(content).hexdigest()}", content)
        return self.identity() or text

    def _bring(self, root: Path, markers: Mapping[str, Marker]) -> None:
        """Fetch contents beside their places, hold them against their markers, and put them there."""
        if not markers:
            return
        partials = {name: beside(root / name) for name in markers}
        for partial in partials.values():
            partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._reached("read") as (files, base):
                sources = [f"{base}/{marker.place(name)}" for name, marker in markers.items()]
                try:
                    files.get(sources, [str(partial) for partial in partials.values()])
                except FileNotFoundError:
                    for name, source in zip(markers, sources, strict=True):
                        if not files.exists(source):
                            raise self._damaged(name, "is missing") from None
                    raise
            for name, marker in markers.items():
                if Marker.of(partials[name], marker.folder) != marker:
                    raise self._damaged(name, "is not what its marker says")
                fsync(partials[name])
                if marker.folder:
                    unpack_folder(partials[name], root / name)
                else:
                    partials[name].replace(root / name)
                    fsync((root / name).parent)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)

    def _damaged(self, name: str, state: str) -> RunFolderError:
        return RunFolderError(
            f"{self}: the content of {name} {state}; delete {self.shown(name)} and run again to compute it anew"
        )

    def _texts(self, paths: Sequence[str]) -> list[bytes | None]:
        """Small objects, as many at once as the store takes; None for those that are not there."""
        if not paths:
            return []
        with self._reached("read") as (files, base):
            # With an end, or s3fs asks for the size of each before it reads it.
            found = files.cat_ranges([f"{base}/{path}" for path in paths], 0, _LARGEST, on_error="return")
            for text in found:
                if isinstance(text, Exception) and not isinstance(text, FileNotFoundError):
                    raise text
        return [None if isinstance(text, Exception) else text for text in found]

    @contextmanager
    def _reached(self, how: str) -> Iterator[tuple[Any, str]]:
        """The file system of the store and the path in it; what goes wrong there is told without secrets."""
        protocol = self.url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs

            # What others write must be seen: nothing is remembered of listings.
            options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
            yield url_to_fs(self.url, use_listings_cache=False, **options)
        except (RunFolderError, MemoryError):
            raise
        except ImportError:
            package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}")
            raise RunFolderError(f"{self} needs a package that is not installed: pip install {package}") from None
        except Exception as error:
            if how == "read" and isinstance(error, OSError) and error.errno in DISK_FULL:
                raise  # the disk of this machine
            raise RunFolderError(
                f"cannot {how} {self}: {type(error).__name__}: {_first_line(error)}; check the bucket, the "
                "credentials and the network, and run again: what is complete is kept"
            ) from None


def _first_line(error: Exception) -> str:
    return public((str(error).strip().splitlines() or [""])[0])


def public(text: str) -> str:
    """A message without the passwords and signatures that urls in it may carry."""
    return re.sub(r"(://[^\s?\"']*)\?[^\s\"']*", r"\1", re.sub(r"://[^\s\"']*:[^\s\"']*@", "://", text))
