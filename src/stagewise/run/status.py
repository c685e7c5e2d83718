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
from stagewise.traces.store import TraceStore


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        stages: complete cells and all cells of every stage, by its name.
        at_work: who works in the folder, in words.
        underway: sampling cells whose chains are kept half done, with the age of what is kept, seconds.
        failures: what could not be computed, in words, by who tried last.
        reported: whether there is a report of all of them.
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


def status(folder: str | Path) -> Status:
    """Look into a run folder, or that at a url.

    Raises:
        RunFolderError: no run has begun there.
    """
    store = TraceStore.read_only(folder)
    cells = CellList.read(store)
    if cells is None:
        raise RunFolderError(f"no run has begun in {store.place}: it has no cells.json")
    totals, missing = Counter(cell.stage for cell in cells.cells), Counter(cell.stage for cell in cells.missing(store))
    now, failures = time.time(), [name for name in store.names(FAILED) if store.has(name)]
    return Status(
        {stage: (total - missing[stage], total) for stage, total in totals.items()},
        holders(store.root),
        {
            file.name.removesuffix(".zip.underway"): now - file.stat().st_mtime
            for file in sorted((store.root / "cells").glob("*.underway"))
        },
        {Path(name).stem: (store.root / name).read_text(encoding="utf-8") for name in failures},
        cells.reported and not missing,
    )
