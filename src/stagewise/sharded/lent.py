"""The door through which a task comes in: its model is lent, and has its own weights again afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.content import content_digest
from stagewise.data import Samples
from stagewise.dtensors import is_cut
from stagewise.evaluate import Point
from stagewise.in_place import InPlaceModel
from stagewise.ranks import Ranks
from stagewise.sharded.alike import alike, given
from stagewise.sharded.check import check
from stagewise.task import Batch, Losses, Params, Task
from stagewise.vector import ParameterVector


@contextmanager
def ending() -> Iterator[None]:
    """What goes wrong inside ends the process, and with it the others, which wait for it.

    As a ValueError it would be a checkpoint that cannot be used, and this process would go on to the next one alone.
    """
    try:
        yield
    except ValueError as error:
        raise RuntimeError(str(error)) from error


class LentSamples(Samples):
    """Data of which every process reads its own samples."""

    def batch(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Batch:
        """As of any data; one that cannot be read ends the process."""
        with ending():
            return super().batch(index, device)


class LentTask(Task):
    """A task whose model is written into, held by this process and others."""

    pure: InPlaceModel

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the model."""
        return self.pure.ranks

    def weighted_losses(self, params: Params, batch: Batch, query: str | None = None) -> Losses:
        """As of any task; what goes wrong here ends the process."""
        with ending():
            return super().weighted_losses(params, batch, query)


@contextmanager
def lent(task: Task, split: bool, **asked: Any) -> Iterator[LentTask]:
    """The task with its model to be written into.

    Args:
        task: of a model that ``fully_shard`` has sharded, or of a plain one in a process of its own.
        split: whether the samples of a batch are divided among the processes; else each evaluates all.
        **asked: what else decides which numbers are computed.

    Raises:
        ValueError: the model is sharded in a way that is not supported, or not at all although there are several
            processes; these were not given the same; or a sample cannot be read.
    """
    own = object.__new__(LentTask)
    vars(own).update(copy.copy(vars(task)), pure=InPlaceModel(task.model, split))
    vars(own).update(checked=set(), sample_weights=None, grouped_queries=None)
    alike(own.ranks, lambda: given(task, split=split, **asked))
    vars(own).update(train=_lent(task.train), queries={name: _lent(data) for name, data in task.queries.items()})
    with own.pure.borrowed():
        yield own


def _lent(data: Samples) -> LentSamples:
    return LentSamples(data, data.name)


def loaded(task: LentTask, trajectory: Trajectory, step: int) -> Checkpoint:
    """The checkpoint of a step under the model's own names, of each parameter those rows that are here.

    Of files that allow it no others are read.

    Raises:
        ValueError: in all processes, where it cannot be used in one, or is not the same in all.
    """
    fitted: list[Checkpoint] = []

    def read() -> dict[str, str]:
        if trajectory.load_rows is None:
            found = trajectory.load(step)
            fitted.append(task.fitted(found))
        else:
            with task.pure.reading_rows() as wanted:
                found = trajectory.load_rows(step, wanted)
                fitted.append(task.fitted(found))
        whole = trajectory.load_rows is None and not any(map(is_cut, found.params.values()))
        return {
            f"checkpoint at step {step}": found.digest if whole else "",
            f"list of updates after step {step}": content_digest([found.coming_rates, found.coming_batches]),
        }

    alike(task.ranks, read)
    # Which rate most parameters have is counted in those that are here.
    return fitted[0].holding(optimizer=task.ranks.gathered(fitted[0].optimizer)[0])


def point_at(task: LentTask, fitted: Checkpoint, parameters: Sequence[str] = (".*",)) -> Point:
    """The task there, as :func:`stagewise.evaluate.at` finds it.

    Raises:
        ValueError: the losses cannot be used, or no parameter moves.
    """
    updated = fitted.optimizer.updated if fitted.optimizer else None
    point = Point(task, ParameterVector.of(task, parameters, updated), fitted.params)
    check(Point(task, ParameterVector.of(task), fitted.params), task.ranks)
    return point
