"""One update of a replay, backwards: how what comes after it depends on what came before, and on every weight.

With lam the derivative of a query's loss by the state (weights w, moments m and v) after the update, the chain rule
gives that by the state before it and by the weight beta_k of every sample or token k of its batch. For Adam, with
s = sqrt(v'/(1 - b2^t)):

    lam_m += - eta / ((1 - b1^t) (s + eps)) lam_w
    lam_v += eta m'/(1 - b1^t) / (2 s (1 - b2^t) (s + eps)^2) lam_w
    lam_g  = (1 - b1) lam_m + 2 (1 - b2) g lam_v
    d q / d beta_k = a_k <grad l_k(w), lam_g> / sum_i a_i
    lam_w <- (1 - eta decay) lam_w + H lam_g,   lam_m <- b1 lam_m,   lam_v <- b2 lam_v

The first half is autograd's, of :func:`stagewise.retraining.updates.update` itself, so that clipping, decay and
parameter groups are as they are there; the second half is one product of second order for both of its lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.attention import plain_attention
from stagewise.data import Batch
from stagewise.differentiate import differentiable, pull
from stagewise.evaluate import Batching, Point, chunks
from stagewise.retraining.rewind import Keep, in_memory, rewind
from stagewise.retraining.schedule import LearningRate, Order
from stagewise.retraining.scratch import on_disk, room_on_disk
from stagewise.retraining.start import Start
from stagewise.retraining.training import joined, slopes_of
from stagewise.retraining.updates import (
    Rule,
    TrainingState,
    clipped,
    keeps_first_moment,
    keeps_second_moment,
    update,
)
from stagewise.twice import second_derivatives
from stagewise.vector import ParameterVector


class Adjoint(NamedTuple):
    """Derivatives of several numbers by the state of a replay, ``(number, parameters)`` each.

    Attributes:
        params: by the weights.
        first_moment: by SGD's momentum buffer or Adam's raw first moment.
        second_moment: by Adam's raw second moment.
    """

    params: Tensor
    first_moment: Tensor
    second_moment: Tensor

    @classmethod
    def of(cls, gradients: Tensor) -> Adjoint:
        """Of numbers that depend on the weights alone."""
        return cls(gradients, torch.zeros_like(gradients), torch.zeros_like(gradients))


# Numbers held for each parameter and each adjoint, forwards or backwards: its parts, and what autograd keeps.
_HELD = 12
# Entries of a vector whose update is differentiated at once: what autograd keeps of it is many times as long.
_PIECE = 2**20


@dataclass(frozen=True, eq=False)
class Replay:
    """Updates from a checkpoint on, made as the run made them, forwards and backwards.

    Attributes:
        start: the task and the update rule.
        order: the samples of every update.
        span: the updates, from that of the checkpoint on.
        memory: bytes that states and adjoints may take.
        batching: whether several adjoints share a product.
        learning_rate: of the update made at a step; default: the run's own where known, else the checkpoint's, held.
        scratch: folder for states that the memory does not hold; None: they are made again.
    """

    start: Start
    order: Order
    span: range
    memory: float
    batching: Batching
    learning_rate: LearningRate | None = None
    scratch: Path | None = None

    @property
    def at_once(self) -> int:
        """How many adjoints half of the memory holds, one at least."""
        return max(1, int(self.memory / 2 / (_HELD * self._bytes)))

    def states(self) -> Iterator[tuple[int, TrainingState]]:
        """The state after the last update, then every step with the state before its update, the last first.

        Raises:
            ValueError: the weights are not finite after the last update.
        """
        steps, vectors = range(self.span.start, self.span.stop + 1), self._vectors
        keep: Keep[TrainingState] = in_memory
        size = len(vectors) * self._bytes
        room = max(0, int(self.memory / 2 / size) - 1)  # beside the one in use
        if room + 1 < len(steps) and self.scratch is not None and (more := room_on_disk(self.scratch, size)) > room:
            room, keep = more, partial(on_disk, self.scratch, vectors)
        states = rewind(self._advance, self.start.state, steps, room, keep)
        stop, last = next(states)
        _check_finite(self.start, stop, last)
        yield stop, last
        del last  # before earlier ones are made again
        yield from states

    def batches(self, step: int) -> list[Batch]:
        """The samples of an update, in pieces that the task evaluates at once."""
        return list(chunks(self.start.task, self.start.task.train, self.order(step)))

    @property
    def _vectors(self) -> list[str]:
        """The parts of a state that updates change."""
        optimizer = self.start.rule.optimizer
        moments = {
            "first_moment": keeps_first_moment(optimizer),
            "second_moment": keeps_second_moment(optimizer),
        }
        return ["params", *(name for name, kept in moments.items() if kept)]

    @property
    def _bytes(self) -> int:
        """Of one vector."""
        vector = self.start.point.vector
        return vector.size * vector.dtype.itemsize

    def _advance(self, step: int, state: TrainingState) -> TrainingState:
        pieces = (_Summed.of(self.start.point, state.params[0], batch) for batch in self.batches(step))
        slope, used, _ = _mean(pieces)
        return update(self.start.rule, state, slope[None], step, self.learning_rate, used[None])


def _check_finite(start: Start, stop: int, state: TrainingState) -> None:
    """Refuse a replay that leaves the numbers.

    Raises:
        ValueError: weights are not finite.
    """
    if start.task.ranks.total((~torch.isfinite(state.params)).sum()):
        raise ValueError(
            f"the replay of steps {start.step} to {stop} ends with weights that are not finite: training diverges "
            "there, or a training sample in its batches has a loss that is not finite; leave the step out, or mend the "
            "sample"
        )


class Slopes(NamedTuple):
    """What several numbers depend on in one update.

    Attributes:
        by_weight: derivatives by the weight of every sample or token of its batch ``(number, batch)`` or
            ``(number, batch, tokens)``, as the loss returns them.
        by_gradient: derivatives by the gradient that it followed ``(number, parameters)``.
    """

    by_weight: Tensor
    by_gradient: Tensor


def step_back(replay: Replay, state: TrainingState, step: int, adjoint: Adjoint) -> Slopes:
    """Turn the adjoint after an update into that before it, in place.

    Args:
        replay: whose update.
        state: before the update.
        step: number of updates made before this one.
        adjoint: that after it, which is written over.

    Raises:
        ValueError: an operation has no second derivative.
    """
    point, params, batches = replay.start.point, state.params[0], replay.batches(step)
    only = _Summed.of(point, params, batches[0], again=True) if len(batches) == 1 else None
    slope, used, weight = _mean([only] if only else (_Summed.of(point, params, batch) for batch in batches))
    along, parts = _update_back(replay, state, slope[None], used[None], step, adjoint), []
    del slope
    along /= weight  # in place and back: of large models every vector counts
    for batch in batches:
        summed = only or _Summed.of(point, params, batch, again=True)
        only = None  # the product frees what it needs no more
        parts.append(_products(summed, along, adjoint.params, replay.batching))
        del summed
    return Slopes(torch.cat(_of_one_width(parts), 1), along.mul_(weight))


class _Summed(NamedTuple):
    """The gradient of the summed losses of a batch, each with its weight in the objective.

    Attributes:
        slope: ``(parameters,)``; with ``again`` it can be differentiated.
        used: which parameters the losses depend on ``(names,)``.
        weight: the sum of the weights.
        leaf: where it was taken ``(parameters,)``.
        beta: by what the losses are multiplied, 1, as a leaf ``(batch,)`` or ``(batch, tokens)``.
    """

    slope: Tensor
    used: Tensor
    weight: Tensor
    leaf: Tensor
    beta: Tensor

    @classmethod
    def of(cls, point: Point, params: Tensor, batch: Batch, again: bool = False) -> _Summed:
        with plain_attention() if again else nullcontext(), differentiable(params) as leaf:
            pieces = point.vector.unflatten(leaf)
            losses = point.task.weighted_losses({**point.state, **pieces}, batch)
            shares = point.task.shares(losses)
            beta = torch.ones_like(losses.values, requires_grad=True)
            value = (beta * shares * losses.values).sum()
            slope, used = joined(point, slopes_of(value, pieces, create_graph=again), (), leaf)
        return cls(slope, used, shares.detach().sum(), leaf, beta)


def _mean(pieces: Iterable[_Summed]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the objective on all pieces, which parameters it depends on, and the sum of the weights."""
    slope, used, weight = torch.zeros(()), torch.tensor(False), torch.zeros(())
    for piece in pieces:
        slope, used, weight = slope + piece.slope.detach(), used | piece.used, weight + piece.weight
    weight = weight.clamp(min=1e-30)
    return slope / weight, used, weight


def _products(summed: _Summed, sides: Tensor, bent: Tensor, batching: Batching) -> Tensor:
    """Add the Hessian of the summed losses times ``sides (number, parameters)`` to ``bent``.

    Returns:
        The derivatives of slope times side by the weight of every loss ``(number, batch)`` or
        ``(number, batch, tokens)``.
    """
    size, parts = len(sides) if batching == "stacked" else 1, []
    with second_derivatives("exact influence", "sampled and damped influence do without"):
        for first in range(0, len(sides), size):
            rows, last = slice(first, first + size), first + size >= len(sides)
            image, by_weight = pull([summed.slope], [summed.leaf, summed.beta], [sides[rows]], keep=not last)
            bent[rows] += image
            parts.append(by_weight)
    return torch.cat(parts)


def _of_one_width(parts: Sequence[Tensor]) -> list[Tensor]:
    """Values of samples or tokens ``(number, batch)`` or ``(number, batch, tokens)``; of tokens that are not there, 0.

    Batches may be padded to different lengths.
    """
    widest = max(part.shape[-1] for part in parts)
    return [pad(part, (0, widest - part.shape[-1])) if part.ndim == 3 else part for part in parts]


def _update_back(
    replay: Replay, state: TrainingState, slope: Tensor, used: Tensor, step: int, adjoint: Adjoint
) -> Tensor:
    """Turn the adjoint into that before the update at a fixed gradient, in place.

    Returns:
        The adjoint of the gradient ``(number, parameters)``.
    """
    rule = replay.start.rule
    norm = rule.optimizer.clip_norm
    gradient = slope if norm is None else clipped(slope, norm)
    along = unclipped_back(rule, rule.rates_at(step, replay.learning_rate), state, gradient, used, adjoint)
    if norm is None:
        return along
    with differentiable(slope) as leaf:
        return pull([clipped(leaf, norm)], [leaf], [along[:, None]])[0][:, 0]


def unclipped_back(
    rule: Rule, rates: Tensor, state: TrainingState, gradient: Tensor, used: Tensor, adjoint: Adjoint
) -> Tensor:
    """Turn the adjoint into that before an update by a gradient ``(1, parameters)``, clipped or not, in place.

    Returns:
        The adjoint of that gradient ``(number, parameters)``.
    """
    along = torch.empty_like(adjoint.params)
    for piece, names, part in _pieces(rule, rates):
        primals = (state.params, state.first_moment, state.second_moment, gradient)
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [primal[:, piece].detach().requires_grad_() for primal in primals]
            params, first, second, slope_there = leaves
            before = TrainingState(params, first, second, state.counts[:, names])
            after = update(part, before, slope_there, 0, None, used[:, names])
            outputs = [after.params, after.first_moment, after.second_moment]
            sides = [side[:, None, piece] for side in adjoint]
            for target, found in zip((*adjoint, along), pull(outputs, leaves, sides), strict=True):
                target[:, piece] = found[:, 0]
    return along


def _pieces(rule: Rule, rates: Tensor) -> Iterator[tuple[slice, slice, Rule]]:
    """Ranges of the vector and of its names, each with its rule, without clipping: all of a small one at once."""
    rule = replace(rule, optimizer=replace(rule.optimizer, clip_norm=None), rates=rates, coming=())
    vector, first = rule.vector, 0
    if vector.size <= _PIECE:
        yield slice(None), slice(None), rule
        return
    for k, (shape, dtype) in enumerate(zip(vector.shapes, vector.dtypes, strict=True)):
        names, stop = slice(k, k + 1), first + math.prod(shape)
        own = replace(rule, updated=rule.updated[names], rates=rates[names], decays=rule.decays[names])
        for start in range(first, stop, _PIECE):
            size = min(_PIECE, stop - start)
            piece = ParameterVector(vector.names[names], ((size,),), (dtype,))
            yield slice(start, start + size), names, replace(own, vector=piece)
        first = stop
