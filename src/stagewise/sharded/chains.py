"""Sample the local posterior at every checkpoint with a model that several processes hold."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.evaluate import in_any_mode
from stagewise.identity import identity
from stagewise.influence.precision import relative_error
from stagewise.memory import give_back, release
from stagewise.run.engine import ChainSettings, settings_of
from stagewise.run.progress import Progress, silent
from stagewise.run.work import sampling_cells, traced_labels
from stagewise.sampling.chains import Chains, draw_block, unusable_block
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.sampling.restricted import names_of
from stagewise.sharded.fingerprint import fingerprint
from stagewise.sharded.lent import LentTask, lent, loaded, point_at
from stagewise.task import Task
from stagewise.tokens import check_classes
from stagewise.traces.store import Cell, TraceStore, label_words
from stagewise.usable import chosen_steps, none_usable

# Beside what other folders are known by: their chains have other noise, and curvature from derivatives.
_KIND = {"noise": "by blocks of rows", "curvature": "by differences of gradients"}


@in_any_mode
def sample(
    task: Task,
    trajectory: Trajectory | str | Path,
    posterior: LocalPosterior,
    *,
    out: str | Path,
    sampling: Chains | None = None,
    steps: Sequence[int] | None = None,
    split: bool = True,
    progress: Progress = silent,
    **settings: Unpack[ChainSettings],
) -> TraceStore:
    """As :func:`stagewise.sample`, of a model that ``fully_shard`` has sharded: called by all processes alike.

    Chains are looped over. Their noise depends on seed, chain, step, parameter and row, and not on how many processes
    there are: with ``split=False`` and all settings of the sampler given, draws are the same bits on one process or
    two, wherever a device computes a sample's loss and gradient the same way in both; else they are as near as the
    rounding of sums is. A killed run goes on with the first cell that is not complete.

    Args:
        task: what is studied; its model has its own weights again afterwards.
        trajectory: the run's checkpoints, or the folder they are in. Of folders of ``torch.distributed.checkpoint``
            every process reads the parts in which its rows are, of safetensors files its rows.
        posterior: what is sampled, e.g. ``LocalPosterior(window=30)``; parameters move whole.
        out: run folder, which the first process writes.
        sampling: how it is sampled; default ``Chains()``.
        steps: checkpoints to sample, default all.
        split: whether the samples of a batch are divided among the processes; else each evaluates all of them.
        progress: called with (what, done, in all) after every cell.
        **settings: single fields of ``sampling``: chains, draws, sampler, ...

    Returns:
        The store of loss traces, in every process; :func:`stagewise.bif` reads it.

    Raises:
        RunMismatchError: the folder holds other traces, those of :func:`stagewise.sample` among them.
        RunLockedError: another run is sampling into the folder.
        ValueError: the model is sharded in a way that is not supported, the processes were not given the same, or the
            task, a setting or every checkpoint cannot be used.
        RuntimeError: in one process, which ends the others: its samples cannot be read or evaluated any more.

    Example:
        >>> import tempfile, torch, stagewise as sw, stagewise.sharded
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),  # in several processes: sharded by fully_shard
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.model.state_dict(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> run, folder = sw.Trajectory.from_checkpoints([start]), tempfile.TemporaryDirectory()
        >>> store = sw.sharded.sample(task, run, sw.LocalPosterior(window=10), out=folder.name, chains=4, draws=8)
        >>> dict(store.load(0)["train"].sizes)
        {'chain': 4, 'draw': 8, 'sample': 4}
        >>> folder.cleanup()
    """
    run, chosen = as_trajectory(trajectory), replace(sampling or Chains(), **settings)
    _check_supported(chosen)
    settled = settings_of(posterior, chosen)
    with (
        lent(task, split, blocks=chosen.blocks, steps=chosen_steps(run, steps), **settled) as own,
        ExitStack() as stack,
    ):
        ranks = own.ranks
        usable, unusable = _look(own, run, posterior, chosen_steps(run, steps))
        parts = identity(own) | settled | _KIND
        store = ranks.of_first(lambda: TraceStore.open(out, parts))
        first = ranks.index == 0
        ranks.together(lambda: stack.enter_context(store.lock()) if first else None)
        ranks.of_first(store.sweep)
        ranks.of_first(lambda: store.write_labels(*traced_labels(own, chosen)))
        cells = sampling_cells(store, usable, unusable, chosen.blocks)
        for done, cell in enumerate(cells):
            progress("sampling", done, len(cells))
            if not ranks.of_first(partial(store.is_complete, cell)):
                _compute(own, run, posterior, chosen, store, cell, unusable)
        progress("sampling", len(cells), len(cells))
    return store


def _compute(
    task: LentTask,
    run: Trajectory,
    posterior: LocalPosterior,
    sampling: Chains,
    store: TraceStore,
    cell: Cell,
    unusable: dict[int, str],
) -> None:
    """One cell: all processes see the same losses, and the first writes them."""
    if reason := unusable.get(cell.step):
        tree = unusable_block(cell.step, reason, sampling, cell.block)
    else:
        words = label_words(*traced_labels(task, sampling))
        density = _density(task, run, posterior, cell.step)[0]
        own = replace(sampling, batching="loop")
        tree = draw_block(density, own, cell.block, error=lambda seen: relative_error(seen, words))
    task.ranks.of_first(lambda: store.write(cell, tree))
    release(tree)
    give_back()


def _look(
    task: LentTask, run: Trajectory, posterior: LocalPosterior, steps: Sequence[int]
) -> tuple[dict[int, str], dict[int, str]]:
    """Hash of every checkpoint at which there is a posterior, and the reasons why there is none at others, by step.

    Raises:
        ValueError: there is none at all, or a class of tokens of which none counts.
    """
    usable, unusable = dict[int, str](), dict[int, str]()
    for step in steps:
        try:
            _, usable[step] = _density(task, run, posterior, step)
        except ValueError as error:
            unusable[step] = str(error)
    if not usable:
        raise ValueError(none_usable(unusable))
    check_classes(task)
    return usable, unusable


def _density(task: LentTask, run: Trajectory, posterior: LocalPosterior, step: int) -> tuple[LocalDensity, str]:
    """The posterior at a checkpoint, and the hash of that."""
    fitted = loaded(task, run, step)
    density = posterior.around(point_at(task, fitted, names_of(posterior.parameters)), fitted)
    rates = fitted.changing_rates(posterior.window) if posterior.window else ()
    return density, fingerprint(task.pure, fitted) + (f" {rates}" if rates else "")


def _check_supported(sampling: Chains) -> None:
    """Refuse what needs the model in one piece.

    Raises:
        ValueError: with what to use instead.
    """
    if sampling.sampler == "window":
        raise ValueError("sampler='window' is not there for sharded models; use 'underdamped'")
    if sampling.linear:
        raise ValueError("linear=True is not there for sharded models; leave it out")
    if sampling.batching == "stacked":
        raise ValueError("batching='stacked' is not there for sharded models, whose chains are looped over")
