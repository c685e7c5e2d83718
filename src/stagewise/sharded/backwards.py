"""A window's updates on a model that several processes hold, forwards and backwards.

As :mod:`stagewise.retraining.adjoint`, whose first half, the update itself, acts on every entry alone and is used as it
is. FSDP has no second derivatives, so the second half is differences along the adjoint lam_g of the gradient: those of
gradients are the products with the curvature, and those of the losses on the way what each sample's weight does,

    H lam_g          ~ [ grad L(w + h lam_g) - grad L(w - h lam_g) ] / 2h
    <grad l_k, lam_g> ~ [ l_k(w + h lam_g) - l_k(w - h lam_g) ] / 2h
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.attention import slow_path
from stagewise.converging import CONVERGED, converging
from stagewise.data import Batch
from stagewise.derivatives import difference_step
from stagewise.functional import Value
from stagewise.retraining.adjoint import Adjoint, Replay, unclipped_back
from stagewise.retraining.start import Start
from stagewise.retraining.training import joined
from stagewise.retraining.updates import Rule, TrainingState, update
from stagewise.sharded.lent import LentTask
from stagewise.task import Params


class Seen(NamedTuple):
    """What one pass over the samples of an update shows.

    Attributes:
        slope: gradient of the sum of their losses, each with its share in the objective, by the rows that are here.
        used: which parameters it depends on ``(names,)``.
        weight: the sum of the shares.
        losses: of this process's samples, each with its share ``(samples[, tokens])``, float64.
    """

    slope: Tensor
    used: Tensor
    weight: float
    losses: Tensor


class Back(NamedTuple):
    """What several numbers depend on in one update.

    Attributes:
        by_weight: derivatives by the weight of each of this process's samples or tokens
            ``(number, samples[, tokens])``, float64.
        lengths: of the steps of differences of each number, in units of the usual.
        differs: relative change of the first differences over a step three times as long; 0 where it was not looked
            at.
    """

    by_weight: Tensor
    lengths: list[float]
    differs: float


@dataclass(frozen=True, eq=False)
class ShardedReplay(Replay):
    """Updates from a checkpoint on; vectors hold the rows that are here."""

    def seen(self, params: Tensor, step: int) -> Seen:
        """The samples of an update, at ``params (parameters,)``: forward and backward, divided among the processes."""
        point, task = self.start.point, _task(self.start)
        kept, weight = list[Tensor](), list[float]()

        def value(batch: Batch, count: int) -> Value:
            def of(params: Params) -> Tensor:
                losses = task.weighted_losses(params, batch)
                shares = task.shares(losses)[:count]
                shared = shares * losses.values[:count]
                kept.append(shared.detach().double())
                weight.append(float(shares.sum()))
                return shared.sum()

            return of

        parts = task.ranks.parts(self.order(step), task.forward_batch)
        values = [value(task.train.batch(part, task.device), count) for part, count in parts]
        with slow_path(), torch.inference_mode(False), torch.enable_grad():
            found = task.pure.slopes(point.params(params), values)
        slope, used = joined(point, [found.get(name) for name in point.vector.names], (), params)
        total = task.ranks.over_samples(torch.full((), sum(weight), dtype=torch.float64, device=params.device))
        widest = max(part.shape[-1] for part in kept)
        losses = [pad(part, (0, widest - part.shape[-1])) if part.ndim == 2 else part for part in kept]
        return Seen(slope, used, max(float(total), 1e-30), torch.cat(losses))

    def own_rows(self, step: int) -> Tensor:
        """The samples of an update whose losses this process sees, in their order."""
        task = _task(self.start)
        parts = task.ranks.parts(self.order(step), task.forward_batch)
        return torch.cat([part[:count] for part, count in parts])

    @property
    def _bytes(self) -> int:
        """Of the longest vector that a process has: all must keep as many states."""
        vector = self.start.point.vector
        return _task(self.start).ranks.most(vector.size) * vector.dtype.itemsize

    def _advance(self, step: int, state: TrainingState) -> TrainingState:
        seen = self.seen(state.params[0], step)
        gradient, _ = self._clipped(seen.slope / seen.weight)
        return update(_unclipped(self.start.rule), state, gradient[None], step, self.learning_rate, seen.used[None])

    def back(self, state: TrainingState, step: int, adjoint: Adjoint, lengths: list[float]) -> Back:
        """Turn the adjoint after an update into that before it, in place.

        Args:
            state: before the update.
            step: number of updates made before this one.
            adjoint: that after it, which is written over.
            lengths: of the steps of differences, in units of the usual; empty: those at which they converge.

        Raises:
            ValueError: differences have not converged.
        """
        rule, params, here = self.start.rule, state.params[0], self.seen(state.params[0], step)
        slope = here.slope / here.weight
        gradient, norm = self._clipped(slope)
        rates = rule.rates_at(step, self.learning_rate)
        along = unclipped_back(_unclipped(rule), rates, state, gradient[None], here.used[None], adjoint)
        parts, differs, lengths, looks = list[Tensor](), 0.0, list(lengths), not lengths
        for number, (row, bent) in enumerate(zip(along, adjoint.params, strict=True)):
            side = self._clipped_back(row, slope, norm)
            if looks:
                length, change = self._converging(params, side, bent, step, lengths[:1])
                lengths, differs = [*lengths, length], max(differs, change)
            bend, part = self._differences(params, side, step, lengths[number])
            bent += bend
            parts.append(part)
        return Back(torch.stack(parts), lengths, differs)

    def looks(self, step: int) -> bool:
        """Whether differences in the update of a step need steps of a length of their own.

        Before Adam's first update nothing is remembered, and its direction is very long where a gradient is 0.
        """
        start = self.start
        return step == start.step and start.rule.optimizer.name == "adam" and not start.checkpoint.second_moment

    def _differences(self, params: Tensor, side: Tensor, step: int, length: float) -> tuple[Tensor, Tensor]:
        """The curvature of the objective times ``side``, and the derivative along it of every loss with its share."""
        size = length * difference_step(self.start.point, params, side)
        if size == 0:
            here = self.seen(params, step)
            return torch.zeros_like(side), torch.zeros_like(here.losses)
        ahead, behind = (self.seen(params + sign * size * side, step) for sign in (1, -1))
        scale = 1 / (2 * size * ahead.weight)
        return (ahead.slope - behind.slope).mul_(scale), (ahead.losses - behind.losses) * scale

    def _converging(
        self, params: Tensor, side: Tensor, bent: Tensor, step: int, known: list[float]
    ) -> tuple[float, float]:
        """The length of steps at which differences change least when it is three times as long, and by how much.

        One that is ``known`` is taken where they change little at that.

        Products with the curvature are held against the adjoint ``bent`` that they are added to, where that is longer.

        Raises:
            ValueError: that is much at all lengths.
        """
        ranks, least = _task(self.start).ranks, float(_task(self.start).ranks.norm(bent))

        def lengths(bend: Tensor, change: Tensor) -> tuple[float, float]:
            return float(ranks.norm(bend)), float(ranks.over_samples(change.square().sum())) ** 0.5

        def changed(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> float:
            sizes = [max(pair) for pair in zip(lengths(*near), lengths(*far), (least, 0.0), strict=True)]
            by = lengths(far[0] - near[0], far[1] - near[1])
            return max(c / s if s else 0.0 for c, s in zip(by, sizes, strict=True))

        def differences(length: float) -> tuple[Tensor, Tensor]:
            return self._differences(params, side, step, length)

        for length in known:
            if (differs := changed(differences(length), differences(3 * length))) <= CONVERGED:
                return length, differs
        length, differs = converging(differences, changed)
        if not differs <= CONVERGED:
            raise ValueError(
                f"differences do not converge: over a step three times as long those of gradients or losses are "
                f"{differs:.0%} off at best; exact influence of a sharded model needs losses and gradients that are "
                "computed in float32 or float64 throughout"
            )
        return length, differs

    def _clipped(self, slope: Tensor) -> tuple[Tensor, float]:
        """The gradient ``(parameters,)`` as ``clip_grad_norm_`` scales it, and its length before."""
        norm, length = self.start.rule.optimizer.clip_norm, float(_task(self.start).ranks.norm(slope))
        factor = 1.0 if norm is None else min(1.0, norm / (length + 1e-6))
        return slope * factor, length

    def _clipped_back(self, along: Tensor, slope: Tensor, length: float) -> Tensor:
        """The adjoint of the gradient, from that of the clipped one."""
        norm = self.start.rule.optimizer.clip_norm
        if norm is None or norm >= length + 1e-6:
            return along
        inner = float(_task(self.start).ranks.dot(slope, along))
        return along * (norm / (length + 1e-6)) - slope * (norm / (length + 1e-6) ** 2 * inner / length)


def _unclipped(rule: Rule) -> Rule:
    return replace(rule, optimizer=replace(rule.optimizer, clip_norm=None))


def _task(start: Start) -> LentTask:
    return cast(LentTask, start.task)
