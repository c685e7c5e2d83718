"""Bytes that a run reads and writes, over all of its processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self

from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.data import Samples, leaves
from stagewise.task import Task


class Moved(NamedTuple):
    """What processes read, each thing once for every process and cell that needs it.

    Attributes:
        checkpoint: bytes of one, as it is held: weights and what the optimiser remembers.
        data: bytes of all samples, as batches.
        checkpoints: of the run.
    """

    checkpoint: float
    data: float
    checkpoints: int

    @classmethod
    def of(cls, task: Task, checkpoint: Checkpoint, checkpoints: int) -> Self:
        """One checkpoint stands for all, and a few samples for theirs."""
        held = (checkpoint.params, checkpoint.first_moment, checkpoint.second_moment)
        data = sum(_size(samples) for samples in (task.train, *task.queries.values()))
        return cls(sum(_bytes(tensors.values()) for tensors in held), data, checkpoints)

    def read(self, workers: int, cells: int, whole: int = 0, drivers: int = 1) -> float:
        """By all processes.

        Args:
            workers: processes beside the drivers; each knows its task by one checkpoint.
            cells: at one checkpoint.
            whole: cells that need every checkpoint.
            drivers: processes that begin by looking at every checkpoint.
        """
        every = self.checkpoints * (drivers + whole)
        return self.data * (drivers + workers) + self.checkpoint * (every + workers + cells)


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _size(samples: Samples) -> float:
    few = samples.few()
    batch = samples.batch(few)
    return _bytes(leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)) * len(samples) / len(few)
