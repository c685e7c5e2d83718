"""What a name in a run folder on an object store has as its content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from stagewise.traces.archive import packed


@dataclass(frozen=True)
class Marker:
    """Size in bytes, hash, and whether the content is the zip of a folder."""

    size: int
    sha256: str
    folder: bool

    @classmethod
    def of(cls, file: Path, folder: bool) -> Marker:
        """That of a file."""
        with file.open("rb") as opened:
            return cls(file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest(), folder)

    @classmethod
    def parse(cls, text: bytes | None) -> Marker | None:
        """What :meth:`text` gave; None also for half of it, which some stores keep of a writer that was killed."""
        try:
            return None if text is None else cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def text(self) -> bytes:
        """To be written down."""
        return json.dumps(asdict(self)).encode("utf-8")

    def fits(self, path: Path) -> bool:
        """Whether a file or folder is the content."""
        if not path.exists() or path.is_dir() != self.folder:
            return False
        with packed(path) as file:
            return file.stat().st_size == self.size and Marker.of(file, self.folder) == self

    def place(self, name: str) -> str:
        """Where the content lies; under a name that a person who downloads it can use."""
        return f"objects/{self.sha256}/{name.rpartition('/')[2]}{'.zip' if self.folder else ''}"
