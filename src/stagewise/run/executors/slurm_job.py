"""A job of Slurm as whoever submitted it sees it: whether it is over, and what it said last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_OVER = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL"]
_PREEMPTED = "PREEMPTED"
_REQUEUED_WITHIN = 300.0
"""Seconds after which Slurm has requeued a job that it preempted, if it is set up to requeue and not to cancel."""
_LAST_LINES = 5


@dataclass(eq=False)
class Job:
    """A job, and the names of the cells of its share."""

    number: str
    names: set[str]
    over: Callable[[], bool]
    words: Callable[[], str] = lambda: "an earlier driver has submitted it"
    cancel: Callable[[], object] = lambda: None

    @classmethod
    def of(cls, job: Any, names: set[str]) -> Job:
        """One of submitit; a process of this machine knows whether it is over."""
        import submitit

        over = Over(job) if isinstance(job, submitit.SlurmJob) else job.done
        return cls(job.job_id, names, over, partial(_last_words, job), partial(job.cancel, check=False))

    @classmethod
    def here(cls, process: int, names: set[str]) -> Job:
        """A process of this machine that another one has submitted."""
        return cls(str(process), names, partial(_ended, process))


class Over:
    """Whether a job of Slurm is over. It is not as long as it is suspended or held, or may still be requeued.

    submitit's own answer takes one that was preempted for good for waiting, and one that is suspended for over.
    """

    def __init__(self, job: Any) -> None:
        self._job, self._preempted = job, float("inf")

    def __call__(self) -> bool:
        """Ask Slurm, or what submitit remembers of it."""
        if self._job.paths.result_pickle.exists():
            return True
        state = state_of(self._job)
        if state != _PREEMPTED:
            self._preempted = float("inf")
            return state in _OVER
        self._preempted = min(self._preempted, time.monotonic())
        # What is known of the state may be as old.
        return time.monotonic() - self._preempted > _REQUEUED_WITHIN and state_of(self._job, "force") == _PREEMPTED


def state_of(job: Any, mode: str = "standard") -> str:
    """A word of Slurm's: ``PENDING``, ``RUNNING``, ..., or ``UNKNOWN``."""
    job.watcher._finished.discard(job.job_id)  # else what submitit takes for over is not looked at again
    if mode == "force":
        job.get_info(mode)
    return str(job.state).upper().split()[0]  # CANCELLED by 1000


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
