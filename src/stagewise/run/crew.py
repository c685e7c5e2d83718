"""Cells computed by whoever is there, told of as they come, and seen to be in the run folder in the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagewise.memory import let_go
from stagewise.run.executors import Executor, Local, Ray, Slurm
from stagewise.run.executors.base import Ends, Told, finish, give_out
from stagewise.run.executors.local import cores, gpus
from stagewise.run.progress import Progress
from stagewise.run.work import Work
from stagewise.task import Task
from stagewise.traces.files import RunFolderError

_PATIENCE = 60.0
"""Seconds until a file that another machine has written must be seen here: network file systems may show old folders
for so long."""


@dataclass(frozen=True)
class Crew:
    """Who computes the cells of a run.

    Attributes:
        work: what workers need.
        task: the task, for cells that are computed in this process.
        executor: where workers are; None for this machine.
        workers: how many; None for as many as there is room for.
        progress: is told of every cell, by its stage.

    Raises:
        ValueError: there are to be no workers.
    """

    work: Work
    task: Task
    executor: Executor | None
    workers: int | None
    progress: Progress

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}; leave it out for the default")

    def compute(self, cells: Sequence[Any]) -> None:
        """Compute those of the cells that the run folder lacks.

        Raises:
            CellsFailedError: some could not be computed, and are named.
            ValueError: the task is on a GPU, and the executor's workers have none.
            Exception: no worker can be set up, or the first cells to end failed.
        """
        todo = [cell for cell in cells if not self.work.is_complete(cell)]
        counts = Counter(cell.stage for cell in cells)
        done = counts - Counter(cell.stage for cell in todo)
        for stage, total in counts.items():
            self.progress(stage, done[stage], total)

        def tell(cell: Any) -> None:
            done[cell.stage] += 1
            self.progress(cell.stage, done[cell.stage], counts[cell.stage])

        if todo:
            finish(self._ended(todo), tell, before=len(todo) < len(cells))
        for cell in todo:
            self._see(cell)

    def _ended(self, cells: Sequence[Any]) -> Ends[Any]:
        executor, workers = self.executor or Local(), self.workers
        if isinstance(executor, Local):
            workers = workers or default_workers(self.task)
            if workers == 1 or len(cells) <= 1:
                return self._here(cells, executor.threads_each(workers), executor.retries)
        elif isinstance(executor, Ray | Slurm) and not executor.gpus and self.task.device.type == "cuda":
            raise ValueError(
                f"the task is on {self.task.device}, and workers of executor {executor.name} have no GPU: set "
                "executor.gpus, e.g. to 1, or build the task on the CPU"
            )
        return executor.map(self.work, cells, workers, self.work.store.root / "executor")

    def _here(self, cells: Sequence[Any], threads: int, retries: int) -> Ends[Any]:
        """One after another in this process, with so many threads: those of a worker, also for the last cell alone."""
        before = torch.get_num_threads()

        def computed(cell: Any) -> Told:
            torch.set_num_threads(threads)
            try:
                self.work.compute(self.task, cell, self.progress)
            except Exception as error:
                let_go(error)  # or the next cell has no room beside what this one held
                return Told(error)
            return Told()

        try:
            yield from give_out(cells, 1, retries, begin=lambda cell: cell, wait=lambda cells: cells, told=computed)
        finally:
            torch.set_num_threads(before)

    def _see(self, cell: Any) -> None:
        """Whatever a worker has said, what counts is what is in the folder."""
        until = time.monotonic() + _PATIENCE
        while not self.work.is_complete(cell):
            if time.monotonic() > until:
                raise RunFolderError(
                    f"{cell} was computed, but {self.work.store.root} does not hold it: a worker sees another folder, "
                    "or another task or checkpoints, than this process"
                )
            time.sleep(0.1)


def default_workers(task: Task) -> int:
    """One process for every core that this one may use, or where the model lives on GPUs, for each of them."""
    if task.device.type == "cpu":
        return cores()
    return max(1, len(gpus())) if task.device.type == "cuda" else 1
