"""What a worker needs to compute the cells of a run's chains; a cell holds the same wherever it is computed."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.identity import Probe, probe
from stagewise.influence.precision import relative_error
from stagewise.labels import Labels, token_classes
from stagewise.memory import give_back, release
from stagewise.run.before import check_same_task
from stagewise.run.progress import Progress, silent
from stagewise.sampling.chains import Chains, sample_block, unusable_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task
from stagewise.traces.store import Cell, TraceStore, label_words


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
        parts: identity of the task, which every worker's must have, of code by its instructions; None where the task
            itself is sent.
        known: a step, and the probe that it must give there.
    """

    make_task: Callable[[], Task]
    trajectory: Trajectory
    posterior: LocalPosterior
    sampling: Chains
    store: TraceStore
    usable: dict[int, str]
    unusable: dict[int, str]
    parts: dict[str, str] | None
    known: tuple[int, Probe]

    def __call__(self) -> Callable[[Any], None]:
        """In a worker: what computes a cell, with a task of its own.

        Raises:
            ValueError: it is not the task that the run began with.
        """
        task = self.make_task()
        check_same_task(task, self.parts, self.trajectory, self.known)
        return partial(self.compute, task)

    def compute(self, task: Task, cell: Any, progress: Progress = silent) -> None:
        """One cell, into the store. There may be hours in it, of large models: its steps are told too.

        Raises:
            ValueError: the checkpoint is not the one that the run began with.
        """
        if reason := self.unusable.get(cell.step):
            self.store.write(cell, unusable_block(cell.step, reason, self.sampling, cell.block))
            return
        checkpoint = self.checkpoint(task, cell.step)
        underway, on_step = self.store.underway(cell), partial(progress, "steps of this cell")

        def error(seen: xr.DataTree) -> float:
            return relative_error(seen, label_words(*traced_labels(task, self.sampling)))

        tree = sample_block(task, checkpoint, self.posterior, self.sampling, cell.block, on_step, underway, error)
        self.store.write(cell, tree, probe(task, task.fitted(checkpoint)))
        release(tree)
        give_back()  # or the next cell begins with what is left of this one

    def checkpoint(self, task: Task, step: int) -> Checkpoint:
        """As it was when the run began, on whatever machine.

        Raises:
            ValueError: it is another one.
        """
        checkpoint = self.trajectory.load(step)
        if not self.usable[step].startswith(task.fitted(checkpoint).digest):
            raise ValueError(
                f"the checkpoint of step {step} is another one on {socket.gethostname()} than where the run began; "
                "all machines must see the same folder, and nothing may be written into it meanwhile"
            )
        return checkpoint

    def is_complete(self, cell: Any) -> bool:
        """Whether the store holds it.

        Raises:
            RunMismatchError: it holds another in its place.
        """
        return self.store.is_complete(cell)

    @property
    def cells(self) -> list[Cell]:
        """All of them, ascending; the folder may hold some."""
        return sampling_cells(self.store, self.usable, self.unusable, self.sampling.blocks)


def sampling_cells(
    store: TraceStore, usable: Mapping[int, str], unusable: Mapping[int, str], blocks: int
) -> list[Cell]:
    """The cells of a run's chains, ascending, each under the hash of all that decides its numbers.

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
