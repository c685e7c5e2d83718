"""The metric of a window: how far along each parameter the optimiser goes for a unit of gradient.

    P = rate_k / rate                                   SGD; rate_k the parameter's own learning rate
    P = rate_k / rate / (sqrt(v) + eps)                 Adam, v its second moment

Adam's P is that of its memory at the checkpoint, but no larger than it will be at the window's end if gradients stay as
they are: a direction whose memory has faded answers the first new gradient by a step of normal length, and not by one
that is divided by what has faded. Directions in which no training sample has a gradient do not move at all: P = 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.derivatives import mean_gradient
from stagewise.differentiate import differentiable, pull
from stagewise.evaluate import Point, chunks, sample_weights, spread_rows
from stagewise.slopes import weighted_slope
from stagewise.vector import ParameterVector

_PROBES = 4
# A larger training set is represented by this many samples; then nothing is known of what the others touch.
_MOST_SAMPLES = 8192

_SQUARED: WeakKeyDictionary[Point, dict[int | None, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
"""Kept by :func:`squared_gradient` as long as a point is."""


def relative_rates(vector: ParameterVector, optimizer: Optimizer) -> Tensor | None:
    """Each parameter's learning rate over that of the window ``(parameters,)``; None where all share one."""
    if not any(group.learning_rate != optimizer.learning_rate for group in optimizer.groups):
        return None
    rates = {name: group.learning_rate for group in optimizer.groups for name in group.names}
    pieces = [
        torch.full(shape, rates[name] / optimizer.learning_rate, dtype=torch.float64).reshape(-1)
        for name, shape in zip(vector.names, vector.shapes, strict=True)
    ]
    return torch.cat(pieces)


def adam_metric(point: Point, checkpoint: Checkpoint, window: int | None) -> Tensor:
    """Adam's metric at a checkpoint ``(parameters,)``; 0 along parameters that training does not move.

    Args:
        point: the task there, u being the parameters themselves.
        checkpoint: with the second moments.
        window: number of updates; None: the metric of the moment, without a look ahead.

    Raises:
        ValueError: the checkpoint has no second moments.
    """
    optimizer, vector = _adam(checkpoint), point.vector
    known = checkpoint.second_moment
    anchor = vector.flatten(point.state)
    zeros = {n: torch.zeros(s) for n, s in zip(vector.names, vector.shapes, strict=True)}
    moment = vector.flatten(zeros | {n: known[n] for n in vector.names if n in known}).to(anchor)
    counts = update_counts(checkpoint, vector).to(anchor)
    beta = optimizer.betas[1]
    now = moment / (1 - beta**counts).clamp(min=1e-30)
    if window is None:
        moves = moment > 0
        second = now
    else:
        squared, touched = squared_gradient(point, optimizer.batch_size)
        squared = squared * clip_factor(point, optimizer) ** 2
        ahead = (beta**window * moment + (1 - beta**window) * squared) / (1 - beta ** (counts + window))
        second = torch.maximum(now, ahead)
        moves = touched & (second > 0)
    return torch.where(moves, 1 / (second.sqrt() + optimizer.eps), 0.0)


def update_counts(checkpoint: Checkpoint, vector: ParameterVector) -> Tensor:
    """Updates that the moments of each parameter have seen ``(parameters,)``, float64."""
    known, second = checkpoint.update_counts, checkpoint.second_moment
    counts = [known.get(name, checkpoint.step if name in second else 0) for name in vector.names]
    return vector.spread(torch.tensor(counts, dtype=torch.float64))


def squared_gradient(point: Point, batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Mean square of the gradient of one update, and where any sample has a gradient; ``(parameters,)`` each.

    With batches of m of n samples it is  g^2 + (1/m - 1/n) (mean of g_i^2 - g^2).  The mean of squares comes from sums
    with random signs: exact where one sample has a gradient, right on average elsewhere. Metric, clipping and
    localisation ask for the same of a point.
    """
    known = _SQUARED.setdefault(point, {})
    if batch_size not in known:
        known[batch_size] = _squared_gradient(point, batch_size)
    return known[batch_size]


def _squared_gradient(point: Point, batch_size: int | None) -> tuple[Tensor, Tensor]:
    task, at = point.task, point.vector.flatten(point.state)
    n, rows = len(task.train), spread_rows(_MOST_SAMPLES, len(task.train))
    mean_weight = float(sample_weights(point).mean())
    full = mean_gradient(point, at, task.train, rows)
    # Drawn at once: how many samples are evaluated together is a matter of memory, not of the answer.
    signs = torch.randint(0, 2, (_PROBES, len(rows)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    probe = _probed_one_by_one if task.pure.in_place else _probed
    squares, touched = probe(point, at, rows, signs, mean_weight)
    size = min(batch_size or n, n)
    squared = full.square() + (1 / size - 1 / n) * (squares - full.square()).clamp(min=0)
    touched = touched | (full != 0)
    return squared, touched if len(rows) == n else torch.ones_like(touched)


def _probed(point: Point, at: Tensor, rows: Tensor, signs: Tensor, mean_weight: float) -> tuple[Tensor, Tensor]:
    """Mean square of gradients by sums with random signs ``(probe, rows)``, and where one of them is not 0."""
    task, signed, done = point.task, torch.zeros(_PROBES, len(at)).to(at), 0
    for batch in chunks(task, task.train, rows):
        with differentiable(at) as leaf:
            losses, weights = point.sample_losses(leaf, batch)
            here = signs[:, done : done + len(losses)].to(losses)
            for probe in range(_PROBES):
                side = (here[probe] * weights).detach()[None] / mean_weight
                signed[probe] += pull([losses], [leaf], [side], keep=probe + 1 < _PROBES)[0][0]
        done += len(losses)
    return signed.square().mean(0) / len(rows), (signed != 0).any(0)


def _probed_one_by_one(
    point: Point, at: Tensor, rows: Tensor, signs: Tensor, mean_weight: float
) -> tuple[Tensor, Tensor]:
    """The same with one sum in memory."""
    squares, touched = torch.zeros_like(at), torch.zeros_like(at, dtype=torch.bool)
    for own in signs:
        signed, _ = weighted_slope(point, at, point.task.train, rows, signs=own)
        touched |= signed != 0
        squares.add_(signed.square_(), alpha=1 / (len(signs) * len(rows) * mean_weight**2))
    return squares, touched


def clip_factor(point: Point, optimizer: Optimizer) -> float:
    """By how much clipping shortens a typical gradient: the effect of any change of the data is as much smaller.

    The norm that decides is that of all trainable parameters, also of those that the optimiser does not update.
    """
    if optimizer.clip_norm is None:
        return 1.0
    vector = ParameterVector.of(point.task)
    whole = point if vector.names == point.vector.names else replace(point, vector=vector)
    squared, _ = squared_gradient(whole, optimizer.batch_size)
    total = point.task.ranks.total(squared.sum(dtype=torch.float64 if point.task.pure.in_place else None))
    return min(1.0, optimizer.clip_norm / max(math.sqrt(float(total)), 1e-30))


def _adam(checkpoint: Checkpoint) -> Optimizer:
    optimizer = checkpoint.optimizer
    if optimizer is None or optimizer.name != "adam":
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} has no record of Adam, whose second moments metric='adam' "
            "needs; record checkpoints with stagewise.Recorder, or use metric='euclidean'"
        )
    if checkpoint.step > 0 and not checkpoint.second_moment:
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} has no second moments of Adam, which metric='adam' needs; "
            "record checkpoints with stagewise.Recorder, or use metric='euclidean'"
        )
    return optimizer
