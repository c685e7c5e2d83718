"""Where the checkpoints of a configuration come from: a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagewise.checkpoints.trajectory import Trajectory

HUB = "hub:"
"""How the name of a repository begins; a folder of such a name is ``./hub:...``."""

_REVISION = "step{step}"


@dataclass(frozen=True)
class HubName:
    """``hub:organisation/name``, or ``hub:organisation/name@revision`` with ``{step}`` in the revision.

    Attributes:
        repository: ``organisation/name``.
        revision: how a step's branch or tag is called, see :meth:`stagewise.Trajectory.from_hub`.
    """

    repository: str
    revision: str = _REVISION

    def __post_init__(self) -> None:
        parts = self.repository.split("/")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"expected {HUB}organisation/name, e.g. {HUB}EleutherAI/pythia-14m, got {str(self)!r}")
        if self.revision.count("{step}") != 1:
            raise ValueError(f"a revision has {{step}} in it once, e.g. {HUB}org/name@{_REVISION}, got {str(self)!r}")

    @classmethod
    def parse(cls, text: str) -> HubName:
        """What follows ``hub:``.

        Raises:
            ValueError: it is not the name of a repository.
        """
        repository, at, revision = text.removeprefix(HUB).partition("@")
        return cls(repository, revision if at else _REVISION)

    def __str__(self) -> str:
        return f"{HUB}{self.repository}" + (f"@{self.revision}" if self.revision != _REVISION else "")


def trajectory_of(
    source: Path | HubName,
    steps: Sequence[int] | None,
    clip_norm: float | None = None,
    batch_size: int | None = None,
) -> Trajectory:
    """The checkpoints; those of the hub are fetched when they are read.

    Args:
        source: a folder, or a repository.
        steps: of a repository, those to look for.
        clip_norm: of a folder, see :meth:`stagewise.Trajectory.from_directory`.
        batch_size: of a folder, likewise.

    Raises:
        ValueError: the folder or the repository cannot be used, or nothing is installed that can read from the hub.
        FileNotFoundError: the folder is missing, or holds no checkpoint.
    """
    if isinstance(source, Path):
        return Trajectory.from_directory(source, clip_norm=clip_norm, batch_size=batch_size)
    if clip_norm is not None or batch_size is not None:
        raise ValueError("a repository publishes no optimizer; leave out clip_norm and batch_size, which describe one")
    try:
        return Trajectory.from_hub(source.repository, steps, source.revision)
    except ImportError as error:
        raise ValueError(f"checkpoints: {error}") from error
