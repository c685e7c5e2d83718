"""Sampling at every checkpoint of a run, into a folder that may hold some of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.evaluate import in_any_mode
from stagewise.identity import identity, probe
from stagewise.run.before import check_reusable, check_same_task, look
from stagewise.run.crew import Crew
from stagewise.run.executors import Executor
from stagewise.run.progress import Progress, silent
from stagewise.run.work import Work, traced_labels
from stagewise.sampling.chains import Chains
from stagewise.sampling.posterior import LocalPosterior
from stagewise.sampling.tuning import SamplerName, check_sampler
from stagewise.task import Task
from stagewise.traces.mirror import place_of
from stagewise.traces.remote import Remote
from stagewise.traces.store import TraceStore
from stagewise.usable import chosen_steps

# Raised whenever a change alters the numbers a cell would hold: old cells must not be taken for new ones.
NUMERICS_VERSION = "8"


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


@in_any_mode
def sample(
    task: Task,
    trajectory: Trajectory | str | Path,
    posterior: LocalPosterior,
    *,
    out: str | Path | Remote,
    sampling: Chains | None = None,
    steps: Sequence[int] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
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
        out: run folder, or its url on an object store; a killed run continues where it was.
        sampling: how it is sampled; default ``Chains()``.
        steps: checkpoints to sample, default all.
        workers: cells at the same time; default with an executor, as many as it has room for, and without one, one.
            Above one, the task must be picklable and the calling script guarded by ``if __name__ == "__main__":``.
        executor: where they are computed, e.g. ``sw.Ray()``, or ``sw.Local()`` for a process on every core; default
            this process, or as many processes of this machine as ``workers``.
        progress: called with (what, done, in all) after every cell.
        make_task: builds the task in a worker, where the task itself cannot be pickled. It must build the same task
            each time.
        **settings: single fields of ``sampling``: chains, draws, sampler, ...

    Returns:
        The store of loss traces; :func:`stagewise.bif` reads it.

    Raises:
        RunMismatchError: the folder holds traces of another model, data set, loss, posterior or sampler.
        RunLockedError: another process is sampling into the folder.
        CellsFailedError: some cells could not be computed; the others are complete.
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
    work = prepare(task, run, posterior, chosen, out, looked, make_task)
    crew = Crew(work, task, executor, 1 if executor is None and workers is None else workers, progress)
    with work.store.lock():
        begin(work, task)
        crew.compute(work.cells)
    return work.store


def prepare(
    task: Task,
    trajectory: Trajectory,
    posterior: LocalPosterior,
    sampling: Chains,
    out: str | Path | Remote,
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
    build, parts = (partial(_return, task), None) if make_task is None else (make_task, identity(task, text=False))
    if make_task is not None:
        check_same_task(make_task(), parts, trajectory, known)
    place = place_of(out)
    whole = place.absolute() if isinstance(place, Path) else place  # workers may begin in another folder than this
    store = TraceStore.open(whole, identity(task) | settings_of(posterior, sampling))
    work = Work(build, trajectory, posterior, sampling, store, usable, unusable, parts, known)
    for cell in work.cells:
        store.is_complete(cell)  # refuses one of other weights
    check_reusable(store, task, trajectory, sampling.single_tokens)
    return work


def begin(work: Work, task: Task, sweep: bool = True) -> None:
    """Make a run folder ready for its cells. Call it under the store's lock; ``sweep`` if nobody else writes."""
    if sweep:
        work.store.sweep()
    work.store.write_labels(*traced_labels(task, work.sampling))


def settings_of(posterior: LocalPosterior, sampling: Chains) -> dict[str, str]:
    """What the numbers in a run folder depend on beside the task and the checkpoints; blocks may be added later."""
    return {
        "posterior": repr(posterior),
        "sampling": repr(replace(sampling, blocks=1)),
        "torch": torch.__version__.split("+")[0],
        "numerics": NUMERICS_VERSION,
    }


def _return(task: Task) -> Task:
    return task
