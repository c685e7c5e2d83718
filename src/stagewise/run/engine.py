"""Where cells are computed: in this process or in a pool of workers; a cell holds the same either way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.evaluate import in_any_mode
from stagewise.identity import Probe, identity, probe
from stagewise.influence.precision import relative_error
from stagewise.labels import Labels, token_classes
from stagewise.memory import give_back, release
from stagewise.run.before import check_reusable, check_same_task, look
from stagewise.run.progress import Progress, silent
from stagewise.sampling.chains import Chains, sample_block, unusable_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.sampling.tuning import SamplerName, check_sampler
from stagewise.task import Task
from stagewise.traces.store import Cell, TraceStore, label_words
from stagewise.usable import chosen_steps

# Raised whenever a change alters the numbers a cell would hold: old cells must not be taken for new ones.
NUMERICS_VERSION = "7"


class ChainSettings(TypedDict, total=False):
    """The fields of :class:`stagewise.sampling.chains.Chains`, for editors."""

    sampler: SamplerName
    chains: int
    blocks: int
    draws: int | Literal["auto"]
    precision: float
    most_draws: int
    step_size: float | None
    options: dict[str, float]
    burn_in: int | None
    thinning: int | None
    batch_size: int | None
    control_variate: bool
    reflect: bool
    linear: bool
    single_tokens: bool
    batching: Literal["auto", "stacked", "loop"]
    seed: int


@dataclass(frozen=True)
class Work:
    """All that a worker needs to compute cells.

    Attributes:
        make_task: returns the task; called once in every worker.
        trajectory: the checkpoints.
        posterior: what is sampled.
        sampling: how.
        store: where cells go.
        usable: the content hash of every checkpoint at which there is a posterior, by step.
        unusable: reasons why there is none, by step.
        parts: identity of the task, which every worker's must have.
        known: a step, and the probe that it must give there.
    """

    make_task: Callable[[], Task]
    trajectory: Trajectory
    posterior: LocalPosterior
    sampling: Chains
    store: TraceStore
    usable: dict[int, str]
    unusable: dict[int, str]
    parts: dict[str, str]
    known: tuple[int, Probe]

    @property
    def cells(self) -> list[Cell]:
        """All of them, ascending; the folder may hold some."""
        return cells_of(self.store, self.usable, self.unusable, self.sampling.blocks)


def cells_of(store: TraceStore, usable: Mapping[int, str], unusable: Mapping[int, str], blocks: int) -> list[Cell]:
    """The cells of a run, ascending, each under the hash of all that decides its numbers.

    Args:
        store: of the run.
        usable: the content hash of every checkpoint at which there is a posterior, by step.
        unusable: the other steps; without a checkpoint's hash.
        blocks: of every step.
    """
    known = [f"{name}={value}" for name, value in sorted(store.identity.items())]

    def cell(step: int, block: int) -> Cell:
        parts = [*known, usable.get(step) or "unusable", str(step), str(block)]
        return Cell(step, block, hashlib.sha256("\0".join(parts).encode()).hexdigest())

    return [cell(step, block) for step in sorted({*usable, *unusable}) for block in range(blocks)]


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
    run, chosen = as_trajectory(trajectory), replace(sampling or Chains(), **settings)
    check_sampler(posterior, chosen)
    looked = look(task, run, posterior, chosen_steps(run, steps))
    work = prepare(task, run, posterior, chosen, Path(out), looked, make_task)
    with work.store.lock():
        compute(work, task, workers, progress)
    return work.store


def prepare(
    task: Task,
    trajectory: Trajectory,
    posterior: LocalPosterior,
    sampling: Chains,
    out: Path,
    looked: tuple[dict[int, str], dict[int, str]],
    make_task: Callable[[], Task] | None = None,
) -> Work:
    """Open the run folder for these cells; what it holds already is held against what the task gives now.

    ``looked`` is what :func:`stagewise.run.before.look` has found at the checkpoints.

    Raises:
        RunMismatchError: the folder is of another run.
        ValueError: ``make_task`` builds another task each time.
    """
    usable, unusable = looked
    last = max(usable)
    known = last, probe(task, task.fitted(trajectory.load(last)))
    parts = identity(task)
    if make_task is not None:
        check_same_task(make_task(), parts, trajectory, known)
    store = TraceStore.open(out, parts | settings_of(posterior, sampling))
    build = make_task or partial(_return, task)
    work = Work(build, trajectory, posterior, sampling, store, usable, unusable, parts, known)
    for cell in work.cells:
        store.is_complete(cell)  # refuses one of other weights
    check_reusable(store, task, trajectory, sampling.single_tokens)
    return work


def compute(work: Work, task: Task, workers: int = 1, progress: Progress = silent) -> None:
    """Compute the cells that the store lacks. Call it under the store's lock."""
    store = work.store
    store.sweep()
    cells = work.cells
    todo = [cell for cell in cells if not store.is_complete(cell)]
    store.write_labels(*traced_labels(task, work.sampling))
    progress("sampling", len(cells) - len(todo), len(cells))
    for done, _ in enumerate(_computed(work, task, todo, workers, progress), start=len(cells) - len(todo) + 1):
        progress("sampling", done, len(cells))


def default_workers(task: Task) -> int:
    """One process per core that this one may use; a single one where the model lives on a GPU: all would share it."""
    if task.device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings_of(posterior: LocalPosterior, sampling: Chains) -> dict[str, str]:
    """What the numbers in a run folder depend on beside the task and the checkpoints; blocks may be added later."""
    return {
        "posterior": repr(posterior),
        "sampling": repr(replace(sampling, blocks=1)),
        "torch": torch.__version__.split("+")[0],
        "numerics": NUMERICS_VERSION,
    }


def traced_labels(task: Task, sampling: Chains) -> tuple[Labels | None, dict[str, Labels | None]]:
    """Labels of the traced losses of the candidates and of every query set.

    Where losses were kept by sample and label, one row of labels for all samples.
    """

    def traced(path: str) -> Labels | None:
        labels = task.label_sets[path]
        if labels is None or labels.ndim == 1 or sampling.single_tokens:
            return labels
        return np.array([token_classes(labels)[0]])

    return traced("train"), {name: traced(f"queries/{name}") for name in task.queries}


def _computed(work: Work, task: Task, cells: Sequence[Cell], workers: int, progress: Progress) -> Iterator[Cell]:
    """Compute the cells and yield each when it is in the store.

    One after another in this process there may be hours in each, of large models: their steps are told too.
    """
    if workers == 1 or len(cells) <= 1:
        for cell in cells:
            _compute(work, cell, task, partial(progress, "steps of this cell"))
            yield cell
        return
    context = _processes()
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (work, threads)) as pool:
        try:
            waiting = {pool.submit(_work_on, cell): cell for cell in cells}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield waiting.pop(future)
        except BaseException:
            # Nobody waits for the cells that are under way, which may take hours: they are absent, and computed again.
            for process in list(pool._processes.values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _processes() -> BaseContext:
    """How workers start. A process that has used torch's threads must not be forked; one that has only imported it may.

    So all workers are forked from a server that imports once what they need, where the system has such a thing.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _compute(work: Work, cell: Cell, task: Task, on_step: Callable[[int, int], object] | None = None) -> None:
    if reason := work.unusable.get(cell.step):
        work.store.write(cell, unusable_block(cell.step, reason, work.sampling, cell.block))
        return
    checkpoint = work.trajectory.load(cell.step)
    underway = work.store.underway(cell)

    def error(seen: xr.DataTree) -> float:
        return relative_error(seen, label_words(*traced_labels(task, work.sampling)))

    tree = sample_block(task, checkpoint, work.posterior, work.sampling, cell.block, on_step, underway, error)
    work.store.write(cell, tree, probe(task, task.fitted(checkpoint)))
    release(tree)
    give_back()  # or the next cell begins with what is left of this one


_work: Work | None = None  # what this worker process computes with; set once when it starts


def _start_worker(work: Work, threads: int) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    quiet_vmap()
    _work = work


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for another cell for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


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
    """Silence torch's notes on operations it cannot stack: stacking is tried, and not used where it does not pay."""
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")


def _return(task: Task) -> Task:
    return task
