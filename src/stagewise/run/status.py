"""How far a run is: what its folder holds of the cells that it needs, without its task or its checkpoints."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stagewise.run.cells_file import CellList
from stagewise.run.opened import FAILED
from stagewise.traces.files import RunFolderError
from stagewise.traces.lock import holders


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        stages: complete cells and all cells of every stage, by its name.
        at_work: who works in the folder, in words.
        underway: sampling cells whose chains are kept half done, with the age of what is kept, seconds.
        failures: what could not be computed, in words, by who tried last.
        reported: whether the report was written after the last of the cells.
    """

    stages: dict[str, tuple[int, int]]
    at_work: list[str]
    underway: dict[str, float]
    failures: dict[str, str]
    reported: bool

    @property
    def missing(self) -> int:
        """Cells that are to be computed."""
        return sum(total - done for done, total in self.stages.values())


def status(root: Path) -> Status:
    """Look into a run folder.

    Raises:
        RunFolderError: no run has begun there.
    """
    cells = CellList.read(root)
    if cells is None:
        raise RunFolderError(f"no run has begun in {root}: it has no cells.json")
    totals, missing = Counter(cell.stage for cell in cells.cells), Counter(cell.stage for cell in cells.missing(root))
    now, report = time.time(), root / "report.html"
    files = [root / cell.file for cell in cells.cells]
    last = max((file.stat().st_mtime for file in files if file.exists()), default=now)
    return Status(
        {stage: (total - missing[stage], total) for stage, total in totals.items()},
        holders(root),
        {
            file.name.removesuffix(".zip.underway"): now - file.stat().st_mtime
            for file in sorted((root / "cells").glob("*.underway"))
        },
        {file.stem: file.read_text(encoding="utf-8") for file in sorted((root / FAILED).glob("*.txt"))},
        not missing and report.exists() and report.stat().st_mtime >= last,
    )
