"""Cells in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from stagewise.run.executors.base import Ends, Setup, Told, Worker, WorkerDiedError, begin_worker, give_out

C = TypeVar("C", bound=Hashable)

_DEVICES = "CUDA_VISIBLE_DEVICES"
_NOT_BEGUN = (
    "a worker process ended before it had computed anything, with exit code {code}; its own message is above. Workers "
    'import the script that asks for them: keep it in a file, and what it does under `if __name__ == "__main__":`, or '
    "compute in this process: workers=1"
)


class Local(BaseModel):
    """Processes of this machine: one per GPU where the model lives on GPUs, else one per core.

    Example:
        >>> import stagewise as sw
        >>> sw.Local(threads=2).retries
        2
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["local"] = "local"
    threads: int | None = Field(
        None, gt=0, description="threads of PyTorch in each worker; default the cores divided by the workers"
    )
    retries: int = Field(2, ge=0, description="how often a cell is tried again whose worker was killed, or failed")

    def threads_each(self, workers: int) -> int:
        """Of PyTorch in each of so many workers."""
        return self.threads or max(1, torch.get_num_threads() // workers)

    def map(
        self, setup: Setup[C], cells: Sequence[C], workers: int | None = None, folder: Path | None = None
    ) -> Ends[C]:
        """See :class:`stagewise.run.executors.base.Executor`.

        Every process has a pool of its own: when one dies it is known at which cell, and the others go on.
        """
        del folder
        yield from self.map_pickled(_pickled(setup), cells, workers, type(setup).__module__)

    def map_pickled(
        self,
        setup: bytes,
        cells: Sequence[C],
        workers: int | None = None,
        module: str = __name__,
        begun: Callable[[C], object] = lambda _: None,
    ) -> Ends[C]:
        """The same with a setup that is pickled already, perhaps as this process could not do it.

        Args:
            setup: pickled.
            cells: all different.
            workers: how many at the same time.
            module: what all workers import.
            begun: told of every cell that is about to be given to a worker.
        """
        workers = workers or cores()
        threads = self.threads_each(workers)
        context, devices = _processes(module), gpus()
        every = [
            _Process(context, (setup, threads, devices[k % len(devices)] if devices else None))
            for k in range(min(workers, len(cells)))
        ]
        free, of = [*every], dict[Future[Told], _Process]()

        def begin(cell: C) -> Future[Told]:
            begun(cell)
            process = free.pop()
            future = process.pool.submit(_work_on, cell)
            of[future] = process
            return future

        def told(future: Future[Told]) -> Told:
            free.append(process := of.pop(future))
            return process.result(future)

        try:
            yield from give_out(cells, len(every), self.retries, begin, _ended, told)
        finally:
            # Nobody waits for the cells that are under way, which may take hours: they are absent, and computed again.
            for process in every:
                process.end()


def _pickled(setup: Setup[Any]) -> bytes:
    try:
        return pickle.dumps(setup)
    except Exception as error:  # of whatever the task is made of
        raise ValueError(
            f"the task cannot be sent to worker processes ({error}): make it of functions and classes that a file "
            "defines at its top level, or give make_task, or compute in this process: workers=1"
        ) from error


def _ended(futures: Sequence[Future[Told]]) -> set[Future[Told]]:
    return wait(futures, return_when=FIRST_COMPLETED).done


class _Process:
    """One worker process, and another in its place when it has died."""

    def __init__(self, context: BaseContext, given: tuple[bytes, int, str | None]) -> None:
        self._context, self._given = context, given
        self.pool, self._has_begun = self._started(), False

    def result(self, future: Future[Told]) -> Told:
        """What it says of a cell, or that it died."""
        try:
            said = future.result()
        except BrokenProcessPool:
            return self._dead()
        self._has_begun = True
        return said

    def _dead(self) -> Told:
        """Another one is in its place from now on."""
        (process,) = self.pool._processes.values()
        self.pool.shutdown()  # which joins the process: a code that two threads ask for at a time is not known
        self.pool, code = self._started(), process.exitcode or 0
        if code == -signal.SIGKILL:
            return Told(WorkerDiedError("a worker process was killed, most likely because memory ran out"))
        if self._has_begun or code < 0:
            return Told(WorkerDiedError(f"a worker process ended with exit code {code}"))
        return Told(RuntimeError(_NOT_BEGUN.format(code=code)), started=False)

    def end(self) -> None:
        """Whatever it is at."""
        for process in list((self.pool._processes or {}).values()):
            process.kill()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, _start_worker, self._given)


def expect_workers(module: str) -> None:
    """Begin with what all workers need, beside whatever this process does before it has cells for them."""
    if _processes(module).get_start_method() == "forkserver":
        forkserver.ensure_running()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the GPUs that this process may use."""
    if not (count := torch.cuda.device_count()):
        return []
    given = environment.get(_DEVICES, "")
    return [name.strip() for name in given.split(",") if name.strip()][:count] or [str(k) for k in range(count)]


def _processes(module: str) -> BaseContext:
    """How workers start. A process that has used torch's threads must not be forked; one that has only imported it may.

    So all workers are forked from a server that imports once what they need, where the system has such a thing.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module])
    return context


_worker: Worker | None = None  # what this process computes with; set once when it starts


def _start_worker(setup: bytes, threads: int, device: str | None) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ[_DEVICES] = device  # before anything asks for a GPU
    begin_worker(threads)
    _worker = Worker(setup)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for another cell for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work_on(cell: Any) -> Told:
    if _worker is None:
        raise RuntimeError("a worker was given a cell before it was started")
    return _worker(cell)
