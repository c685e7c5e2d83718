"""Cells in jobs of Slurm, submitted as one array by submitit; every job goes through a share of the cells.

Jobs tell of their cells on a :class:`stagewise.run.executors.board.Board`. So a driver that was killed finds the jobs
it had submitted still at work, waits for their cells, and submits the others alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from stagewise.run.executors.base import Ends, Setup, Told, Tries, WorkerDiedError
from stagewise.run.executors.board import Board
from stagewise.run.executors.share import Share
from stagewise.run.executors.slurm_job import Job, Over, state_of

C = TypeVar("C", bound=Hashable)

_EXTRA = "executor slurm needs submitit: pip install 'stagewise[slurm]'"
_JOBS = 8
_REQUEUED = 20
"""How often a job that comes near its time limit is requeued, before it is over: one cell may take longer than that."""


class Slurm(BaseModel):
    """Jobs of Slurm. They share the run folder with this process, which waits for them.

    Example:
        >>> import stagewise as sw
        >>> sw.Slurm(jobs=16, cpus=8, minutes=120, partition="gpu").retries
        2
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["slurm"] = "slurm"
    jobs: int | None = Field(
        None,
        gt=0,
        description=f"jobs of the array; each goes through its share of the cells; default as many as workers need, "
        f"or {_JOBS} where there are none given",
    )
    cpus: int = Field(1, gt=0, description="cores of each job, which works on so many cells at a time if it has no GPU")
    gpus: int = Field(0, ge=0, description="GPUs of each job, which works on so many cells at a time")
    minutes: int = Field(240, gt=0, description="time limit of each job; one that comes near it is requeued")
    memory: float | None = Field(None, gt=0, description="GB of each job")
    partition: str | None = Field(None, description="of the cluster")
    account: str | None = Field(None, description="that pays")
    more: dict[str, Any] = Field(
        default_factory=dict, description="other options of sbatch, e.g. {qos: low, constraint: a100}"
    )
    cluster: Literal["slurm", "local"] = Field("slurm", description="local: jobs are processes here, to try it out")
    retries: int = Field(2, ge=0, description="how often a cell is tried again whose job was killed, or that failed")
    poll: float = Field(2.0, gt=0, description="seconds between two looks at what the jobs have done")

    @property
    def threads(self) -> int:
        """Of PyTorch in each worker."""
        return max(1, self.cpus // (self.gpus or self.cpus))

    def map(
        self, setup: Setup[C], cells: Sequence[C], workers: int | None = None, folder: Path | None = None
    ) -> Ends[C]:
        """See :class:`stagewise.run.executors.base.Executor`; ``folder`` must be seen by all jobs.

        Raises:
            ImportError: submitit is not installed.
            ValueError: there is no Slurm here.
        """
        if folder is None:
            raise ValueError("executor slurm needs a folder that its jobs share with this process")
        board, tries, complete = Board(folder.absolute() / "slurm"), Tries(self.retries), False
        left: dict[str, C] = {_name(cell): cell for cell in cells}
        jobs = [job for job in self._found(board) if job.names & set(left)]
        waiting = set(left).difference(*(job.names for job in jobs))
        try:
            while left:
                if waiting:
                    board.forget(waiting)
                    names = _in_order([name for name in left if name in waiting], tries, complete)
                    alone = {name for name in names if tries.failed(name)}
                    jobs += self._submitted(board, setup, {name: left[name] for name in names}, alone, workers)
                    board.note_jobs({job.number: job.names for job in jobs})
                    waiting = set()
                over = [job for job in jobs if job.over()]  # asked before what they said is read
                said = board.told(left)
                for job in over:
                    jobs.remove(job)
                    if lost := job.names & set(left) - set(said):
                        error = WorkerDiedError(f"job {job.number} ended: {job.words()}")
                        # It has not died of cells that it had not begun, unless it died before it began any.
                        again = {name: tries.again(name, error) for name in board.begun(lost) or lost}
                        said |= {name: Told(error) for name in again if not again[name]}
                        waiting |= lost - set(said)
                for name, told in said.items():
                    if not told.started:
                        raise told.error or RuntimeError(name)
                    complete = complete or told.error is None
                    yield left.pop(name), told.error
                if left and not waiting:
                    time.sleep(self.poll)
        finally:
            for job in jobs:
                if left:
                    job.cancel()

    def shape(self, workers: int | None = None) -> tuple[int, int, int]:
        """Jobs, processes of each, and threads of each process; for so many cells at a time, unless jobs are given."""
        each = self.gpus or self.cpus
        jobs = self.jobs or (_JOBS if workers is None else math.ceil(workers / each))
        return jobs, each, max(1, self.cpus // each)

    def _submitted(
        self,
        board: Board,
        setup: Setup[Any],
        cells: Mapping[str, Any],
        alone: set[str],
        workers: int | None,
    ) -> list[Job]:
        """One array of jobs."""
        try:
            import cloudpickle
            import submitit
        except ImportError as error:
            raise ImportError(_EXTRA) from error
        jobs, each, threads = self.shape(workers)
        count, names, pickled = min(jobs, len(cells)), [*cells], cloudpickle.dumps(setup)
        parts = [{name: cells[name] for name in names[k::count]} for k in range(count)]
        shares = [Share(board, pickled, part, alone & set(part), each, threads, self.retries) for part in parts]
        try:
            executor = submitit.AutoExecutor(board.root / "%j", self.cluster, slurm_max_num_timeout=_REQUEUED)
        except RuntimeError as error:
            raise ValueError(f"there is no Slurm here ({error}): run this where sbatch is") from error
        executor.update_parameters(**self._parameters())
        with _as_if_outside(), executor.batch():
            made = [executor.submit(share) for share in shares]
        return [Job.of(job, set(share.cells)) for job, share in zip(made, shares, strict=True)]

    def _parameters(self) -> dict[str, Any]:
        given = {
            "name": "stagewise",
            "timeout_min": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem_gb": self.memory,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_additional_parameters": self.more or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _found(self, board: Board) -> list[Job]:
        """Jobs that a driver before this one has submitted, and that are still there."""
        if not (noted := board.noted_jobs()):
            return []
        import submitit

        if self.cluster == "local":
            jobs = [Job.here(int(number), names) for number, names in noted.items()]
            return [job for job in jobs if not job.over()]
        there: dict[str, Any] = {number: submitit.SlurmJob(board.root / "%j", number) for number in noted}
        # Slurm forgets jobs after a while: one that it does not know would be waited for for ever.
        left = [number for number, job in there.items() if state_of(job) != "UNKNOWN" and not Over(job)()]
        return [Job.of(there[number], noted[number]) for number in left]


def _name(cell: Any) -> str:
    return hashlib.sha256(repr(cell).encode()).hexdigest()[:32]


def _in_order(names: Sequence[str], tries: Tries, complete: bool) -> list[str]:
    """Those at which a job may have died come last, so that others are complete before one dies again.

    But where jobs died at several and no cell is complete they come first: it may be all that they die of.
    """
    fresh = [name for name in names if not tries.failed(name)]
    suspect = sorted((name for name in names if tries.failed(name)), key=tries.failed)
    return [*fresh, *suspect] if complete or len(suspect) <= 1 else [*suspect, *fresh]


def _as_if_outside() -> AbstractContextManager[None]:
    """A job that is submitted from within another one must not take over what Slurm has set for that."""
    from submitit.helpers import clean_env

    return clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
