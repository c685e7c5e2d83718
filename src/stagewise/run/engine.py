"""Where cells are computed: in this process or in a pool of workers; a cell holds the same either way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from stagewise.checkpoint import Checkpoint, tensors_digest
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.run.progress import Progress, silent
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.gradient import choose_batching
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task
from stagewise.traces.identity import read_identity
from stagewise.traces.store import Cell, RunFolderError, TraceStore

# Raised whenever a change alters the numbers a cell would hold: old cells must not be taken for new ones.
NUMERICS_VERSION = "2"


@dataclass(frozen=True)
class Work:
    """All that a worker needs to compute cells.

    Attributes:
        make_task: returns the task; called once in every worker.
        trajectory: the checkpoints.
        posterior: what is sampled.
        plan: how; ``batching`` decided.
        store: where cells go.
        threads: threads of a worker.
    """

    make_task: Callable[[], Task]
    trajectory: Trajectory
    posterior: LocalPosterior
    plan: Chains
    store: TraceStore
    threads: int


def sample(
    task: Task,
    trajectory: Trajectory,
    *,
    posterior: LocalPosterior,
    out: str | Path,
    steps: Sequence[int] | None = None,
    workers: int = 1,
    progress: Progress = silent,
    make_task: Callable[[], Task] | None = None,
    **plan: Any,
) -> TraceStore:
    """Sample the local posterior at every checkpoint; what the run folder holds is not computed again.

    Args:
        task: what is studied.
        trajectory: the run's checkpoints.
        posterior: what is sampled, e.g. ``LocalPosterior(window=30)``.
        out: run folder; a killed run continues where it was.
        steps: checkpoints to sample, default all that the posterior can be defined at.
        workers: processes. Above one, the task must be picklable and the calling script guarded by
            ``if __name__ == "__main__":``.
        progress: called with (what, done, in all) after every cell.
        make_task: builds the task in a worker, where the task itself cannot be pickled.
        **plan: the fields of :class:`stagewise.sampling.chains.Chains`: chains, draws, sampler, ...

    Returns:
        The store of loss traces; :func:`stagewise.bif` reads it.

    Raises:
        RunMismatchError: the folder holds traces of another model, data set, loss, posterior or sampler.
        RunLockedError: another process is sampling into the folder.
        ValueError: the task, a checkpoint or a setting cannot be used.
    """
    chains = Chains(**plan)
    chosen = steps_to_sample(trajectory, posterior, steps)
    out = Path(out)
    chains = replace(chains, batching=_batching(task, trajectory, posterior, chains, out, chosen))
    store = TraceStore.open(out, identity(task, posterior, chains))
    with store.lock():
        store.sweep()
        cells = [
            Cell(step, block, key)
            for step in chosen
            for block, key in enumerate(_keys(store, task, trajectory.load(step), chains.blocks))
        ]
        todo = [cell for cell in cells if not store.is_complete(cell)]
        progress("sampling", len(cells) - len(todo), len(cells))
        threads = max(1, torch.get_num_threads() // workers)
        work = Work(make_task or partial(_return, task), trajectory, posterior, chains, store, threads)
        for done, _ in enumerate(_computed(work, task, todo, workers), start=len(cells) - len(todo) + 1):
            progress("sampling", done, len(cells))
        store.write_labels(task.train_groups, task.query_groups)
    return store


def steps_to_sample(trajectory: Trajectory, posterior: LocalPosterior, steps: Sequence[int] | None = None) -> list[int]:
    """The steps that are asked for; by default all recorded ones, but for step 0 in Adam's metric.

    Before its first update Adam has no second moments.

    Raises:
        ValueError: a step has no checkpoint, or no step is asked for.
    """
    if steps is not None:
        missing = sorted(set(steps) - set(trajectory.steps))
        if missing or not steps:
            raise ValueError(f"steps {missing} have no checkpoint; there are {list(trajectory.steps)}")
        return list(steps)
    metric = posterior.metric_for(trajectory.load(trajectory.steps[0]).optimizer)
    return [step for step in trajectory.steps if step > 0 or metric != "adam"]


def default_workers(task: Task) -> int:
    """One process per core that this one may use; a single one where the model lives on a GPU: all would share it."""
    if task.device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identity(task: Task, posterior: LocalPosterior, plan: Chains) -> dict[str, str]:
    """What the numbers in a run folder depend on, beside the checkpoints; blocks may be added later."""
    return task.identity() | {
        "posterior": repr(posterior),
        "sampling": repr(replace(plan, blocks=1, batching="auto")),
        "batching": plan.batching,
        "torch": torch.__version__.split("+")[0],
        "numerics": NUMERICS_VERSION,
    }


def _computed(work: Work, task: Task, cells: Sequence[Cell], workers: int) -> Iterator[Cell]:
    """Compute the cells and yield each when it is in the store."""
    if workers == 1 or len(cells) <= 1:
        for cell in cells:
            _compute(work, cell, task)
            yield cell
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch's threads can hang
    with ProcessPoolExecutor(workers, context, _start_worker, (work,)) as pool:
        waiting = {pool.submit(_work_on, cell): cell for cell in cells}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield waiting.pop(future)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _compute(work: Work, cell: Cell, task: Task) -> None:
    checkpoint = work.trajectory.load(cell.step)
    work.store.write(cell, sample_block(task, checkpoint, work.posterior, work.plan, cell.block))


_worker: Work | None = None  # what this worker process computes with; set once when it starts


def _start_worker(work: Work) -> None:
    global _worker
    torch.set_num_threads(work.threads)
    quiet_vmap()
    _worker = work


def _work_on(cell: Cell) -> None:
    if _worker is None:
        raise RuntimeError("a worker was given a cell before it was started")
    _compute(_worker, cell, _task_from(_worker.make_task))


@cache
def _task_from(make_task: Callable[[], Task]) -> Task:
    """A worker's task, made with its first cell and not at its start, where an error would not reach the parent."""
    return make_task()


def quiet_vmap() -> None:
    """Silence torch's notes on operations it cannot stack: stacking is timed, and not used where it does not pay."""
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")


def _return(task: Task) -> Task:
    return task


def _keys(store: TraceStore, task: Task, checkpoint: Checkpoint, blocks: int) -> list[str]:
    """The content hash of every block of a checkpoint's chains."""
    parts = [f"{name}={value}" for name, value in sorted(store.identity.items())]
    own = {name: tensor for name, tensor in task.state().items() if name not in checkpoint.params}
    parts += [checkpoint.digest, tensors_digest(own), str(checkpoint.step)]
    return [hashlib.sha256("\0".join([*parts, str(block)]).encode()).hexdigest() for block in range(blocks)]


def _batching(
    task: Task,
    trajectory: Trajectory,
    posterior: LocalPosterior,
    plan: Chains,
    out: Path,
    steps: Sequence[int],
) -> Any:
    """Stacked or loop: as asked, else as the run folder was begun, else whichever is faster here."""
    if plan.batching != "auto":
        return plan.batching
    try:
        return read_identity(out)["batching"]
    except (RunFolderError, KeyError):
        density = posterior.at(task, trajectory.load(steps[-1]))
        return choose_batching(density, plan.chains, plan.batch_size)
