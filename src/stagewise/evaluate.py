"""A task at a point of its parameters: its losses and their weights, in batches that fit in memory.

Several places are evaluated stacked (``vmap``) where the model allows it, one by one elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import pad

from stagewise.check import check
from stagewise.checkpoint import Checkpoint
from stagewise.data import Batch, Samples
from stagewise.task import Losses, Task
from stagewise.vector import ParameterVector

Batching = Literal["stacked", "loop"]
"""Several places in one ``torch.func.vmap``, or one by one: for models that vmap cannot trace or that are large."""

CURVATURE_SAMPLES = 2048
"""Enough samples to see the spectrum; a larger training set is represented by this many of them."""

_PRODUCT_COST = 2**36
"""Parameters times losses behind one product with the curvature, of models so large that fewer samples must do."""

_FEWEST = 8

in_any_mode = torch.inference_mode(False)
"""Decorates what users call: what it computes must be differentiable, whatever mode the caller is in."""


@dataclass(frozen=True, eq=False)
class Point:
    """A task as a function of a vector u of the parameters that move.

    Attributes:
        task: the task.
        vector: which parameters move.
        state: all parameters and buffers by name, on the task's device; those that do not move are taken from here.
        anchor: where u = 0 lies ``(parameters,)``; None: u holds the parameters themselves.
        scale: length of a unit of u along each parameter ``(parameters,)``; None: 1.
    """

    task: Task
    vector: ParameterVector
    state: Mapping[str, Tensor]
    anchor: Tensor | None = None
    scale: Tensor | None = None

    def params(self, u: Tensor) -> dict[str, Tensor]:
        """All parameters and buffers at one place ``(parameters,)``."""
        if self.scale is None:
            moved = u if self.anchor is None else self.anchor + u
        else:
            moved = self.scale * u
            moved = moved if self.anchor is None else moved.add_(self.anchor)
        return {**self.state, **self.vector.unflatten(moved)}

    def losses(self, u: Tensor, batch: Batch, query: str | None = None) -> Losses:
        """Losses of a batch at one place, in nats, and their weights."""
        return self.task.weighted_losses(self.params(u), batch, query)

    def sample_losses(self, u: Tensor, batch: Batch, query: str | None = None) -> tuple[Tensor, Tensor]:
        """Loss and weight of every sample of a batch at one place, ``(batch,)`` each."""
        return self.task.by_sample(self.losses(u, batch, query))

    def grouped_losses(
        self, u: Tensor, batch: Batch, query: str | None = None, tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """What groups are means of: loss and weight of every sample ``(batch,)``, or token ``(batch * tokens,)``.

        Args:
            u: the place.
            batch: the samples.
            query: whose loss is measured; default the training loss.
            tokens: how many a sample has, where groups are of tokens. A batch that was padded less has the first.

        Raises:
            ValueError: the loss has no tokens, or more.
        """
        if not tokens:
            return self.sample_losses(u, batch, query)
        losses = self.losses(u, batch, query)
        if losses.values.ndim == 1 or losses.values.shape[1] > tokens:
            got = "one loss per sample" if losses.values.ndim == 1 else f"{losses.values.shape[1]} tokens"
            raise ValueError(f"groups are of {tokens} tokens in a sample, but the loss returned {got}")
        missing = (0, tokens - losses.values.shape[1])
        values, weights = pad(losses.values, missing), pad(self.task.shares(losses), missing)
        return values.flatten(), weights.flatten()


def at(
    task: Task,
    checkpoint: Checkpoint,
    parameters: Sequence[str] = (".*",),
    *,
    curvature: bool = False,
    train: bool = True,
) -> tuple[Point, Checkpoint]:
    """The door through which every room enters: a checked task at a checked checkpoint.

    Args:
        task: the task.
        checkpoint: as it was recorded.
        parameters: regular expressions; of the parameters that the optimiser updates, those that match one move.
        curvature: whether second derivatives will be used.
        train: whether all training samples will be.

    Returns:
        The point, u being the parameters themselves, and the checkpoint under the model's own names.

    Raises:
        CheckpointError: the checkpoint is of another model.
        ValueError: the losses are unusable, see :func:`stagewise.check.check`, or the model is sharded.
    """
    if task.pure.in_place:
        raise ValueError(
            "the model is sharded (its parameters are DTensors), which this cannot use; stagewise.sharded.sample and "
            "stagewise.sharded.window_influence can, started in all processes by torchrun"
        )
    fitted = task.fitted(checkpoint)
    check(task, fitted, curvature=curvature, train=train)
    updated = fitted.optimizer.updated if fitted.optimizer else None
    return Point(task, ParameterVector.of(task, parameters, updated), fitted.params), fitted


def spread_rows(count: int, n: int) -> Tensor:
    """``count`` of ``n`` samples, evenly spaced: data sets are often sorted, by class for instance."""
    count = min(count, n)
    return torch.arange(count) * n // count


def represented(point: Point) -> Tensor:
    """Training samples that stand for all of them: at most 2048, and of large models as many as can be paid for."""
    task = point.task
    with torch.no_grad():
        values = task.losses(point.state, task.train.batch(slice(0, 1), task.device))
    affordable = _PRODUCT_COST // (values.numel() * point.vector.count)
    return spread_rows(min(CURVATURE_SAMPLES, max(_FEWEST, affordable)), len(task.train))


def chunks(task: Task, data: Samples, rows: Tensor | None = None) -> Iterator[Batch]:
    """The samples ``rows`` of a data set, default all, in batches that fit in memory."""
    rows = torch.arange(len(data)) if rows is None else rows
    return (data.batch(piece, task.device) for piece in torch.split(rows, task.forward_batch))


def sample_weights(point: Point) -> Tensor:
    """The weight a_i of every training sample in the objective ``(n,)``, float64. It depends on the data alone."""
    task = point.task
    if task.sample_weights is None:
        weights = _uniform_weights(point)
        if weights is None:
            with torch.no_grad():
                parts = [
                    task.sample_losses(point.state, task.train.batch(part, task.device))[1]
                    for part, _ in task.ranks.parts(torch.arange(len(task.train)), task.forward_batch)
                ]
            weights = task.ranks.joined(parts, len(task.train)).cpu().double()
        task.sample_weights = weights
    return task.sample_weights


def _uniform_weights(point: Point) -> Tensor | None:
    """Weights of 1, where one sample is enough to know that all have it."""
    task = point.task
    with torch.no_grad():
        values, weights = task.weighted_losses(point.state, task.train.batch(slice(0, 1), task.device))
    known = weights is None and (values.ndim == 1 or task.objective == "samples")
    return torch.ones(len(task.train), dtype=torch.float64) if known else None


def over_rows(function: Callable[[Tensor], Tensor], rows: Tensor | Sequence[Tensor], batching: Batching) -> Tensor:
    """``function`` of every row of ``rows (k, parameters)``: ``(k, ...)``."""
    if batching == "stacked" and isinstance(rows, Tensor) and len(rows) > 1:
        stacked: Tensor = vmap(function)(rows)
        return stacked
    return torch.stack([function(row) for row in rows])
