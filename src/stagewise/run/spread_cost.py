"""How long cells take on the workers that a configuration asks for, when they are given out as its executor does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import NamedTuple, Self

import torch

from stagewise.run.config import RunConfig
from stagewise.run.crew import default_workers
from stagewise.run.executors import Ray, Slurm
from stagewise.run.executors.local import cores
from stagewise.task import Task


class Priced(NamedTuple):
    """The cells of one stage.

    Attributes:
        stage: its name.
        cells: how many there are.
        seconds: of one worker for each.
        later: whether they are only known to be needed when others are there.
        whole: whether each needs every checkpoint of the run.
    """

    stage: str
    cells: int
    seconds: float
    later: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Workers:
    """Those who compute cells at the same time.

    Attributes:
        count: how many.
        threads: of PyTorch in each.
        gpus: of each.
        jobs: of Slurm among which all cells are dealt out beforehand; 0: whoever is free takes the next one.
        away: whether they are processes of their own even if there is only one.
        kind: what they are, in words.
    """

    count: int = 1
    threads: int = 1
    gpus: float = 0.0
    jobs: int = 0
    away: bool = False
    kind: str = "worker(s) here"

    @classmethod
    def of(cls, config: RunConfig, task: Task) -> Self:
        """Those that the configuration asks for.

        Raises:
            ValueError: they are to be as many as a Ray cluster has room for, and there is none.
        """
        executor, asked = config.executor, config.workers
        if isinstance(executor, Slurm):
            jobs, each, threads = executor.shape(asked)
            return cls(jobs * each, threads, executor.gpus / each, jobs, True, f"worker(s) in {jobs} job(s) of Slurm")
        if isinstance(executor, Ray):
            return cls(asked or executor.room(), executor.cpus, executor.gpus, away=True, kind="worker(s) of Ray")
        count = asked or default_workers(task)
        return cls(count, executor.threads_each(count), float(task.device.type == "cuda"))

    def measured_with(self) -> int:
        """Threads that tell here what a worker takes; this machine may have fewer than a worker."""
        return min(self.threads, max(torch.get_num_threads(), cores()))

    @property
    def processes(self) -> int:
        """How many there are beside the one that asks for the cells, which computes them itself if it is alone."""
        return self.count if self.away or self.count > 1 else 0

    def walls(self, cells: Sequence[float]) -> list[float]:
        """Seconds until each job is through with its share of the cells; one number where there are no jobs.

        Args:
            cells: seconds of each, in the order in which they are begun.
        """
        if not self.jobs:
            return [_last(cells, self.count)]
        count, each = max(1, min(self.jobs, len(cells))), self.count // self.jobs
        return [_last(cells[k::count], each) for k in range(count)]

    def wall(self, cells: Sequence[float]) -> float:
        """Seconds until the last cell is complete."""
        return max(self.walls(cells))

    def held(self, cells: Sequence[float]) -> float:
        """Seconds of workers that somebody else cannot use: a job holds all of its own until its share is complete."""
        return sum(self.walls(cells)) * (self.count / self.jobs) if self.jobs else sum(cells)


def seconds_of(stages: Sequence[Priced], later: bool = False) -> list[float]:
    """Of each cell, in the order in which they are begun: those that are sure to be needed, or those ``later``."""
    return [stage.seconds for stage in stages if stage.later == later for _ in range(stage.cells)]


def _last(cells: Sequence[float], workers: int) -> float:
    """When the last of the cells is complete, if whoever is free takes the next one."""
    free = [0.0] * workers
    for seconds in cells:
        heapreplace(free, free[0] + seconds)
    return max(free)
