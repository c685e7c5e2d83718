"""What a run is predicted to cost, and how that is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stagewise.run.moved_cost import Moved
from stagewise.run.slices import Slice
from stagewise.run.spread_cost import Priced, Workers, seconds_of

_MANY = (1, 4, 16, 64, 256)  # numbers of workers that are compared


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a run.

    Attributes:
        stages: the cells, in the order in which they are begun.
        workers: who computes them.
        memory: most bytes of one worker on the CPU, while its chains move or while a cell is written; what chains take
            is what a few steps and draws took.
        disk: bytes of all traces.
        steps: sampler steps over all cells.
        checks: seconds before the first cell, on one process; every slice has them too.
        set_up: seconds of each worker beside this process, before its first cell.
        closing: seconds after the last cell, on one process, by what they are spent on.
        kept: at most so many bytes of results beside the traces.
        moved: what is read.
        part: the slice of the cells that is asked for; None for all.
        notes: what was understood of the data, and what will be left out.
    """

    stages: tuple[Priced, ...]
    workers: Workers
    memory: float = 0.0
    disk: float = 0.0
    steps: int = 0
    checks: float = 0.0
    set_up: float = 0.0
    closing: Mapping[str, float] = field(default_factory=dict)
    kept: float = 0.0
    moved: Moved | None = None
    part: Slice | None = None
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        """All units of work."""
        return sum(stage.cells for stage in self.stages)

    @property
    def parts(self) -> dict[str, float]:
        """Wall-clock seconds of the whole run, by what they are spent on."""
        return self._alone | {"cells": self._cells(self.workers)}

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def least(self) -> float:
        """Seconds that no number of workers goes below: of one process, and of the longest cells."""
        longest = [max(seconds_of(self.stages, later), default=0.0) for later in (False, True)]
        return sum(self._alone.values()) + sum(longest)

    def of_slice(self, part: Slice) -> float:
        """Seconds of one slice: its checks and its cells."""
        return self.checks + self._begun(self.workers, part.part(seconds_of(self.stages)))

    def with_workers(self, count: int) -> float:
        """Seconds with another number of workers, of as many threads each, who take cells one by one."""
        others = replace(self.workers, count=count, jobs=0)
        return sum(self._alone.values()) + self._cells(others)

    def text(self) -> str:
        """For a person."""
        return "\n".join([*self._work(), *self._time(), *self._sizes(), *self.notes])

    @property
    def _alone(self) -> dict[str, float]:
        return {"checks before the work": self.checks, **self.closing}

    def _cells(self, workers: Workers) -> float:
        sure, later = (self._begun(workers, seconds_of(self.stages, late)) for late in (False, True))
        return sure + later

    def _begun(self, workers: Workers, cells: Sequence[float]) -> float:
        """Cells, and before them the processes that are made for them."""
        return workers.wall(cells) + (self.set_up if cells and workers.processes else 0.0)

    def _work(self) -> list[str]:
        lines = [f"{self.cells} cells in {len(self.stages)} stage(s), {self.steps:,} sampler steps in all"]
        return lines + [f"        {s.cells:>5} x {duration(s.seconds):>12}  {s.stage}" for s in self.stages]

    def _time(self) -> list[str]:
        workers, alone = self.workers, sum(self._alone.values())
        crew = f"{workers.count} {workers.kind}, {workers.threads} thread(s) each"
        lines = [f"time    about {duration(self.seconds)} with {crew}"]
        lines += [f"        {duration(seconds):>12}  {what}" for what, seconds in self.parts.items()]
        numbers = [count for count in _MANY if count < 4 * self.cells]
        others = ", ".join(f"{count}: {duration(self.with_workers(count))}" for count in numbers)
        lines.append(f"        by the number of workers, {others}")
        lines.append(
            f"        never below {duration(self.least)}, of which {duration(alone)} on one process whatever there is"
        )
        if self.part:
            lines += self._slices(self.part)
        return [*lines, self._spent()]

    def _slices(self, part: Slice) -> list[str]:
        each = [self.of_slice(Slice(number, part.of)) for number in range(1, part.of + 1)]
        merged = self.checks + sum(self.closing.values()) + self._begun(self.workers, seconds_of(self.stages, True))
        count = len(part.part(seconds_of(self.stages)))
        return [
            f"slice   {part}: {count} cells, about {duration(self.of_slice(part))} with the workers above",
            f"        all {part.of} at once: about {duration(max(each))}, one after another {duration(sum(each))}; "
            f"then the merge: {duration(merged)}",
        ]

    def _spent(self) -> str:
        sure, later = (seconds_of(self.stages, late) for late in (False, True))
        workers = self.workers
        held = (workers.held(sure) + (workers.held(later) if later else 0.0)) / 3600
        words = [f"{held:.2g} worker-hours for the cells", f"{held * workers.threads:.2g} core-hours"]
        if workers.jobs:
            words.append(f"{held * workers.jobs / workers.count:.2g} job-hours")
        if workers.gpus:
            words.append(f"{held * workers.gpus:.2g} GPU-hours")
        return f"spent   {', '.join(words)}"

    def _sizes(self) -> list[str]:
        lines = [
            f"memory  about {size(self.memory)} for each worker, beside the libraries",
            f"disk    about {size(self.disk)} of traces, at most {size(self.kept)} of other results",
        ]
        if self.moved is None:
            return lines
        whole, begun = sum(s.cells for s in self.stages if s.whole), self.part.of if self.part else 1
        processes = begun * min(self.workers.processes, math.ceil(self.cells / begun))
        read = self.moved.read(processes, self.cells - whole, whole, begun + bool(self.part))
        return [
            *lines,
            f"read    about {size(read)} by all processes together: each the data ({size(self.moved.data)}), and each "
            f"cell its checkpoint ({size(self.moved.checkpoint)})",
        ]


def duration(seconds: float) -> str:
    """``0.3 seconds``, ``40 seconds``, ``3.5 minutes``, ``12.0 hours``."""
    if seconds < 60:
        return f"{seconds:.0f} seconds" if seconds >= 9.95 else f"{seconds:.2g} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"


def size(count: float) -> str:
    """Of so many bytes: ``3 KiB``, ``0.3 MiB``, ``40 MiB``, ``3.5 GiB``."""
    mib = count / 2**20
    if mib >= 2**10:
        return f"{mib / 2**10:,.1f} GiB"
    if mib >= 9.95:
        return f"{mib:.0f} MiB"
    return f"{mib:.2g} MiB" if mib >= 0.1 else f"{count / 2**10:.2g} KiB"
