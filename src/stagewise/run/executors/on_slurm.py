"""Cells in jobs of Slurm, submitted as one array by submitit; every job goes through a share of the cells.

Jobs tell of their cells on a :class:`stagewise.run.executors.board.Board`. So a driver that was killed finds the jobs
it had submitted still at work, waits for their cells, and submits the others alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from stagewise.run.executors.base import Ends, Setup, Told, Tries, WorkerDiedError
from stagewise.run.executors.board import Board
from stagewise.run.executors.local import Local

C = TypeVar("C", bound=Hashable)

_EXTRA = "executor slurm needs submitit: pip install 'stagewise[slurm]'"
_LAST_LINES = 5


class Slurm(BaseModel):
    """Jobs of Slurm. They share the run folder with this process, which waits for them.

    Example:
        >>> import stagewise as sw
        >>> sw.Slurm(jobs=16, cpus=8, minutes=120, partition="gpu").retries
        2
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["slurm"] = "slurm"
    jobs: int = Field(8, gt=0, description="jobs of the array; each goes through its share of the cells")
    cpus: int = Field(1, gt=0, description="cores of each job, which works on so many cells at a time if it has no GPU")
    gpus: int = Field(0, ge=0, description="GPUs of each job, which works on so many cells at a time")
    minutes: int = Field(240, gt=0, description="time limit of each job; one that reaches it is requeued")
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
        board, tries = Board(folder.absolute() / "slurm"), Tries(self.retries)
        left: dict[str, C] = {_name(cell): cell for cell in cells}
        jobs = [job for job in self._found(board) if job.names & set(left)]
        waiting = set(left).difference(*(job.names for job in jobs))
        try:
            while left:
                if waiting:
                    board.forget(waiting)
                    jobs += self._submitted(
                        board, setup, {name: left[name] for name in left if name in waiting}, workers
                    )
                    board.note_jobs({job.number: job.names for job in jobs})
                    waiting = set()
                over = [job for job in jobs if job.over()]  # asked before what they said is read
                said = board.told(left)
                for job in over:
                    jobs.remove(job)
                    for name in job.names & set(left) - set(said):
                        error = WorkerDiedError(f"job {job.number} ended: {job.words()}")
                        if tries.again(name, error):
                            waiting.add(name)
                        else:
                            said[name] = Told(error)
                for name, told in said.items():
                    if not told.started:
                        raise told.error or RuntimeError(name)
                    yield left.pop(name), told.error
                if left and not waiting:
                    time.sleep(self.poll)
        finally:
            for job in jobs:
                if left:
                    job.cancel()

    def shape(self, workers: int | None = None) -> tuple[int, int, int]:
        """Jobs, processes of each, and threads of each process, for so many cells at a time."""
        each = self.gpus or self.cpus
        return self.jobs if workers is None else math.ceil(workers / each), each, max(1, self.cpus // each)

    def _submitted(self, board: Board, setup: Setup[Any], cells: Mapping[str, Any], workers: int | None) -> list[_Job]:
        """One array of jobs."""
        try:
            import cloudpickle
            import submitit
        except ImportError as error:
            raise ImportError(_EXTRA) from error
        jobs, each, threads = self.shape(workers)
        count, names, pickled = min(jobs, len(cells)), [*cells], cloudpickle.dumps(setup)
        shares = [
            Share(board, pickled, {name: cells[name] for name in names[k::count]}, each, threads, self.retries)
            for k in range(count)
        ]
        try:
            executor = submitit.AutoExecutor(folder=board.root / "%j", cluster=self.cluster)
        except RuntimeError as error:
            raise ValueError(f"there is no Slurm here ({error}): run this where sbatch is") from error
        executor.update_parameters(**self._parameters())
        made = executor.map_array(Share.work, shares)
        return [_Job.of(job, set(share.cells)) for job, share in zip(made, shares, strict=True)]

    def _parameters(self) -> dict[str, Any]:
        given = {
            "name": "stagewise",
            "timeout_min": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus,
            "mem_gb": self.memory,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_additional_parameters": self.more or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _found(self, board: Board) -> list[_Job]:
        """Jobs that a driver before this one has submitted, and that are still there."""
        if not (noted := board.noted_jobs()):
            return []
        import submitit

        if self.cluster == "local":
            jobs = [_Job(number, names, partial(_ended, int(number))) for number, names in noted.items()]
            return [job for job in jobs if not job.over()]
        there: dict[str, Any] = {number: submitit.SlurmJob(board.root / "%j", number) for number in noted}
        # Slurm forgets jobs after a while: one that it does not know would be waited for for ever.
        left = [number for number, job in there.items() if not job.done(force_check=True) and job.state != "UNKNOWN"]
        return [_Job.of(there[number], noted[number]) for number in left]


@dataclass(frozen=True)
class Share:
    """What one job does.

    Attributes:
        board: where it tells of its cells.
        setup: the pickled setup of a worker.
        cells: by the names under which they are told of.
        processes: how many cells at a time.
        threads: of each process.
        retries: how often a cell is tried again in this job.
    """

    board: Board
    setup: bytes
    cells: Mapping[str, Any]
    processes: int
    threads: int
    retries: int

    def work(self) -> None:
        """Go through the cells that are not told of yet."""
        told = self.board.told(self.cells)
        names = {cell: name for name, cell in self.cells.items() if name not in told}
        executor = Local(threads=self.threads, retries=self.retries)
        try:
            for cell, error in executor.map_pickled(self.setup, [*names], self.processes):
                self.board.tell(names[cell], Told(error))
        except Exception as error:
            for name in names.values():
                self.board.tell(name, Told(error, started=False))

    def checkpoint(self) -> Any:
        """Called by submitit at the time limit, and when a job is preempted: the job is to begin again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self.work)


@dataclass(eq=False)
class _Job:
    """A job of the array."""

    number: str
    names: set[str]
    over: Callable[[], bool]
    words: Callable[[], str] = lambda: "an earlier driver has submitted it"
    cancel: Callable[[], object] = lambda: None

    @classmethod
    def of(cls, job: Any, names: set[str]) -> _Job:
        return cls(job.job_id, names, job.done, partial(_last_words, job), partial(job.cancel, check=False))


def _name(cell: Any) -> str:
    return hashlib.sha256(repr(cell).encode()).hexdigest()[:32]


def _last_words(job: Any) -> str:
    """How a job ended, and the end of what it wrote."""
    lines = (job.stderr() or job.stdout() or "").strip().splitlines()
    return "\n".join([f"state {job.state}", *lines[-_LAST_LINES:]])


def _ended(process: int) -> bool:
    """Whether a process of this machine is no more."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False
