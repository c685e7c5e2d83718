"""What one job of Slurm does: it goes through its share of the cells, in processes of its own, and tells of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from stagewise.run.executors.base import Told
from stagewise.run.executors.board import Board
from stagewise.run.executors.local import Local


@dataclass(frozen=True)
class Share:
    """What one job does.

    Attributes:
        board: where it tells of its cells.
        setup: the pickled setup of a worker.
        cells: by the names under which they are told of, in the order in which they are begun.
        alone: those of them, by name, beside which no other is computed: jobs have died at them, or at others that were
            under way with them.
        processes: how many of the others at a time.
        threads: of each process.
        retries: how often a cell is tried again in this job.
    """

    board: Board
    setup: bytes
    cells: Mapping[str, Any]
    alone: Collection[str]
    processes: int
    threads: int
    retries: int

    def __call__(self) -> None:
        """Go through the cells that are not told of yet."""
        from submitit.core.utils import UncompletedJobError

        told = self.board.told(self.cells)
        left = [name for name in self.cells if name not in told]
        try:
            for alone, group in groupby(left, self.alone.__contains__):
                self._compute([*group], 1 if alone else self.processes)
        except UncompletedJobError:  # not of the cells: the job has no more time, and is over
            raise
        except Exception as error:
            told = self.board.told(left)
            for name in left:
                if name not in told:
                    self.board.tell(name, Told(error, started=False))

    def _compute(self, names: Collection[str], processes: int) -> None:
        of = {self.cells[name]: name for name in names}
        executor = Local(threads=self.threads, retries=self.retries)
        ends = executor.map_pickled(self.setup, [*of], processes, begun=lambda cell: self.board.begin(of[cell]))
        for cell, error in ends:
            self.board.tell(of[cell], Told(error))

    def checkpoint(self) -> Any:
        """Called by submitit shortly before the time limit, and when a job is preempted: it is to begin again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
