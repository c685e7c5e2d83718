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
from typing import Any, Literal, TypedDict, Unpack

import torch

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.evaluate import in_any_mode
from stagewise.groups import Labels
from stagewise.identity import Probe, identity, probe
from stagewise.run.before import check_reusable, check_same_task, look
from stagewise.run.progress import Progress, silent
from stagewise.sampling.chains import Chains, SamplerName, sample_block, unusable_block
from stagewise.sampling.gradient import choose_batching
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task
from stagewise.traces.identity import read_identity
from stagewise.traces.store import Cell, RunFolderError, TraceStore
from stagewise.usable import chosen_steps

# Raised whenever a change alters the numbers a cell would hold: old cells must not be taken for new ones.
NUMERICS_VERSION = "3"


class ChainSettings(TypedDict, total=False):
    """The fields of :class:`stagewise.sampling.chains.Chains`, for editors."""

    sampler: SamplerName
    chains: int
    blocks: int
    draws: int
    step_size: float | None
    options: dict[str, float]
    burn_in: int | None
    thinning: int | None
    batch_size: int | None
    control_variate: bool
    reflect: bool
    batching: Literal["auto", "stacked", "loop"]
    seed: int


@dataclass(frozen=True)
class Work:
    """All that a worker needs to compute cells.

    Attributes:
        make_task: returns the task; called once in every worker.
        trajectory: the checkpoints.
        posterior: what is sampled.
        sampling: how; ``batching`` decided.
        store: where cells go.
        unusable: reasons why there is no posterior, by step.
        parts: identity of the task, which every worker's must have.
        known: a step, and the probe that it must give there.
        threads: threads of a worker.
    """

    make_task: Callable[[], Task]
    trajectory: Trajectory
    posterior: LocalPosterior
    sampling: Chains
    store: TraceStore
    unusable: dict[int, str]
    parts: dict[str, str]
    known: tuple[int, Probe]
    threads: int


@in_any_mode
def sample(
    task: Task,
    trajectory: Trajectory | str | Path,
    posterior: LocalPosterior,
    *,
    out: str | Path,
    sampling: Chains | None = None,
    steps: Sequence[int] | None = None,
    workers: int = 1,
    progress: Progress = silent,
    make_task: Callable[[], Task] | None = None,
    **settings: Unpack[ChainSettings],
) -> TraceStore:
    """Sample the local posterior at every checkpoint; what the run folder holds is not computed again.

    A checkpoint at which there is no posterior (no record of its optimiser, a learning rate of 0, other parameters than
    the model's, ...) is left out, and its verdict says why.

    Args:
        task: what is studied.
        trajectory: the run's checkpoints, or the folder they are in.
        posterior: what is sampled, e.g. ``LocalPosterior(window=30)``.
        out: run folder; a killed run continues where it was.
        sampling: how it is sampled; default ``Chains()``.
        steps: checkpoints to sample, default all.
        workers: processes. Above one, the task must be picklable and the calling script guarded by
            ``if __name__ == "__main__":``.
        progress: called with (what, done, in all) after every cell.
        make_task: builds the task in a worker, where the task itself cannot be pickled. It must build the same task
            each time.
        **settings: single fields of ``sampling``: chains, draws, sampler, ...

    Returns:
        The store of loss traces; :func:`stagewise.bif` reads it.

    Raises:
        RunMismatchError: the folder holds traces of another model, data set, loss, posterior or sampler.
        RunLockedError: another process is sampling into the folder.
        ValueError: the task, a setting or every checkpoint cannot be used, or ``make_task`` builds another task each
            time.

    Example:
        >>> import tempfile, torch, stagewise as sw
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> run = sw.Trajectory.from_checkpoints([start])
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = sw.sample(task, run, sw.LocalPosterior(window=10), out=folder.name, chains=8, draws=64)
        >>> store.steps, sw.bif(store).value.shape
        ((0,), (1, 2, 1))
        >>> folder.cleanup()
    """
    sampling = replace(sampling or Chains(), **settings)
    run = as_trajectory(trajectory)
    chosen = chosen_steps(run, steps)
    usable, unusable = look(task, run, posterior, chosen)
    last = max(usable)
    known = last, probe(task, task.fitted(run.load(last)))
    parts = identity(task)
    if make_task is not None:
        check_same_task(make_task(), parts, run, known)
    sampling = replace(sampling, batching=_batching(task, run.load(last), posterior, sampling, Path(out)))
    store = TraceStore.open(out, parts | _settings(posterior, sampling))
    cells = [_cell(store, step, block, usable.get(step)) for step in chosen for block in range(sampling.blocks)]
    with store.lock():
        store.sweep()
        todo = [cell for cell in cells if not store.is_complete(cell)]
        check_reusable(store, task, run)
        store.write_labels(_of_candidates(task), task.query_groups)
        progress("sampling", len(cells) - len(todo), len(cells))
        threads = max(1, torch.get_num_threads() // workers)
        build = make_task or partial(_return, task)
        work = Work(build, run, posterior, sampling, store, unusable, parts, known, threads)
        for done, _ in enumerate(_computed(work, task, todo, workers), start=len(cells) - len(todo) + 1):
            progress("sampling", done, len(cells))
    return store


def default_workers(task: Task) -> int:
    """One process per core that this one may use; a single one where the model lives on a GPU: all would share it."""
    if task.device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(posterior: LocalPosterior, sampling: Chains) -> dict[str, str]:
    """What the numbers in a run folder depend on beside the task and the checkpoints; blocks may be added later."""
    return {
        "posterior": repr(posterior),
        "sampling": repr(replace(sampling, blocks=1, batching="auto")),
        "batching": sampling.batching,
        "torch": torch.__version__.split("+")[0],
        "numerics": NUMERICS_VERSION,
    }


def _cell(store: TraceStore, step: int, block: int, digest: str | None) -> Cell:
    """A cell under the hash of all that decides its numbers; without a checkpoint's digest it has none."""
    parts = [f"{name}={value}" for name, value in sorted(store.identity.items())]
    parts += [digest or "unusable", str(step), str(block)]
    return Cell(step, block, hashlib.sha256("\0".join(parts).encode()).hexdigest())


def _of_candidates(task: Task) -> Labels | None:
    return None if task.train_groups is None else task.train_groups[task.candidates.numpy()]


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
    if reason := work.unusable.get(cell.step):
        work.store.write(cell, unusable_block(cell.step, reason, work.sampling, cell.block))
        return
    checkpoint = work.trajectory.load(cell.step)
    tree = sample_block(task, checkpoint, work.posterior, work.sampling, cell.block)
    work.store.write(cell, tree, probe(task, task.fitted(checkpoint)))


_work: Work | None = None  # what this worker process computes with; set once when it starts


def _start_worker(work: Work) -> None:
    global _work
    torch.set_num_threads(work.threads)
    quiet_vmap()
    _work = work


def _work_on(cell: Cell) -> None:
    if _work is None:
        raise RuntimeError("a worker was given a cell before it was started")
    _compute(_work, cell, _own_task())


@cache
def _own_task() -> Task:
    """A worker's task, made with its first cell and not at its start, where an error would not reach the parent."""
    if _work is None:
        raise RuntimeError("a worker was asked for its task before it was started")
    task = _work.make_task()
    check_same_task(task, _work.parts, _work.trajectory, _work.known)
    return task


def quiet_vmap() -> None:
    """Silence torch's notes on operations it cannot stack: stacking is timed, and not used where it does not pay."""
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")


def _return(task: Task) -> Task:
    return task


def _batching(task: Task, checkpoint: Checkpoint, posterior: LocalPosterior, sampling: Chains, out: Path) -> Any:
    """Stacked or loop: as asked, else as the run folder was begun, else whichever is faster here."""
    if sampling.batching != "auto":
        return sampling.batching
    try:
        return read_identity(out)["batching"]
    except (RunFolderError, KeyError):
        return choose_batching(posterior.at(task, checkpoint), sampling.chains, sampling.batch_size)
