"""The very batches of a published run, from its tokens in the order of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stagewise.checkpoint import CheckpointError


@dataclass(frozen=True)
class TokenBatches:
    """Tokens on disk in the order in which a run saw them, one update after the other; the defaults are Pythia's.

    The update made at step s, which leads to the checkpoint of s + 1, saw ``batch_size * length`` tokens from
    ``s * batch_size * length`` on, counted through all files in a row, as the pre-shuffled Pile of Pythia is published
    (``document-00000-of-00020.bin`` and so on). Only what is asked for is read.

    Attributes:
        files: the files in their order; a token may lie in two.
        batch_size: sequences per update.
        length: tokens of a sequence: one more than the model reads, as the last one is a target only.
        dtype: of a token, as numpy calls it.

    Example:
        >>> import tempfile, numpy as np
        >>> from stagewise.checkpoints import TokenBatches
        >>> folder = tempfile.TemporaryDirectory()
        >>> np.arange(24, dtype="<u2").tofile(f"{folder.name}/document-0.bin")
        >>> batches = TokenBatches.of_files([f"{folder.name}/document-0.bin"], batch_size=2, length=4)
        >>> len(batches), batches[1].tolist()
        (3, [[8, 9, 10, 11], [12, 13, 14, 15]])
        >>> folder.cleanup()
    """

    files: tuple[Path, ...]
    batch_size: int = 1024
    length: int = 2049
    dtype: str = "<u2"

    @classmethod
    def of_files(
        cls, files: Iterable[str | Path], batch_size: int = 1024, length: int = 2049, dtype: str = "<u2"
    ) -> TokenBatches:
        """The files in the order given.

        Raises:
            CheckpointError: a file is missing.
            ValueError: there is no file, or a number is not positive.
        """
        paths = tuple(Path(file).expanduser() for file in files)
        if not paths or batch_size < 1 or length < 1:
            raise ValueError(f"tokens need a file and positive sizes, got {len(paths)} files, {batch_size} x {length}")
        if missing := [path for path in paths if not path.is_file()]:
            raise CheckpointError(f"no such file of tokens: {missing[0]}")
        return cls(paths, batch_size, length, dtype)

    @property
    def bytes_per_update(self) -> int:
        """How far the batch of one update is from that of the next."""
        return self.batch_size * self.length * np.dtype(self.dtype).itemsize

    def __len__(self) -> int:
        """Number of updates whose batches are there in full."""
        return sum(path.stat().st_size for path in self.files) // self.bytes_per_update

    def __getitem__(self, step: int) -> Tensor:
        """The tokens of the update made at ``step``: ``(batch_size, length)``, int64.

        Raises:
            IndexError: the files do not reach so far.
        """
        if not 0 <= step < len(self):
            raise IndexError(
                f"no tokens of the update at step {step}; the files hold those of steps 0 to {len(self) - 1}"
            )
        raw = self._read(step * self.bytes_per_update, (step + 1) * self.bytes_per_update)
        tokens = np.frombuffer(raw, self.dtype).astype(np.int64)
        return torch.from_numpy(tokens).reshape(self.batch_size, self.length)

    def _read(self, start: int, stop: int) -> bytes:
        edges = accumulate((path.stat().st_size for path in self.files), initial=0)
        pieces = []
        for path, (first, last) in zip(self.files, pairwise(edges), strict=True):
            if max(start, first) < min(stop, last):
                with path.open("rb") as file:
                    file.seek(max(start, first) - first)
                    pieces.append(file.read(min(stop, last) - max(start, first)))
        return b"".join(pieces)
