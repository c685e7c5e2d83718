"""The door through which a task comes in: its model is lent, and has its own weights again afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.evaluate import Point
from stagewise.in_place import InPlaceModel
from stagewise.ranks import Ranks
from stagewise.sharded.check import check
from stagewise.task import Batch, Losses, Params, Task
from stagewise.vector import ParameterVector


class LentTask(Task):
    """A task whose model is written into, held by this process and others."""

    pure: InPlaceModel

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the model."""
        return self.pure.ranks

    def weighted_losses(self, params: Params, batch: Batch, query: str | None = None) -> Losses:
        """As of any task. What goes wrong here ends the process, and with it the others, which wait for it."""
        try:
            return super().weighted_losses(params, batch, query)
        except ValueError as error:  # which elsewhere means that a checkpoint cannot be used
            raise RuntimeError(str(error)) from error


@contextmanager
def lent(task: Task, split: bool) -> Iterator[LentTask]:
    """The task with its model to be written into.

    Args:
        task: of a model that ``fully_shard`` has sharded, or of a plain one in a process of its own.
        split: whether the samples of a batch are divided among the processes; else each evaluates all.

    Raises:
        ValueError: the model is sharded in a way that is not supported, or not at all although there are several
            processes.
    """
    own = object.__new__(LentTask)
    vars(own).update(copy.copy(vars(task)), pure=InPlaceModel(task.model, split))
    vars(own).update(checked=set(), sample_weights=None, grouped_queries=None)
    with own.pure.borrowed():
        yield own


def loaded(task: LentTask, trajectory: Trajectory, step: int) -> Checkpoint:
    """The checkpoint of a step under the model's own names, of each parameter those rows that are here.

    Of files that allow it no others are read.

    Raises:
        ValueError: in all processes, where it cannot be used in one.
    """

    def read() -> Checkpoint:
        if trajectory.load_rows is None:
            return task.fitted(trajectory.load(step))
        return task.fitted(trajectory.load_rows(step, task.pure.rows_of))

    own = task.ranks.together(read)
    # Which rate most parameters have is counted in those that are here.
    return own.holding(optimizer=task.ranks.gathered(own.optimizer)[0])


def point_at(task: LentTask, fitted: Checkpoint, parameters: Sequence[str] = (".*",)) -> Point:
    """The task there, as :func:`stagewise.evaluate.at` finds it.

    Raises:
        ValueError: the losses cannot be used, or no parameter moves.
    """
    updated = fitted.optimizer.updated if fitted.optimizer else None
    point = Point(task, ParameterVector.of(task, parameters, updated), fitted.params)
    check(Point(task, ParameterVector.of(task), fitted.params))
    return point
