"""Underdamped Langevin dynamics by the BAOAB splitting (Leimkuhler & Matthews 2013)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from stagewise.sampling.base import GradientFunction, Source, standard_normal


class UnderdampedState(NamedTuple):
    """Where every chain is and how fast it moves.

    Attributes:
        position: of every chain ``(chain, parameters)``.
        momentum: of every chain ``(chain, parameters)``, unit mass; the kick that follows is already in it.
    """

    position: Tensor
    momentum: Tensor


@dataclass(frozen=True)
class Underdamped:
    """Langevin dynamics with inertia: half kick, half drift, friction and noise, half drift, half kick.

    The second half kick and the first of the next step are by the same gradient, and done together: all that is kept
    of a chain is its position and its momentum.

    For a quadratic potential the positions are sampled without step-size error at any stable step
    (step_size * sqrt(precision) < 2), and the slowest direction relaxes in the *square root* of the condition
    number of steps, where overdamped SGLD needs the condition number itself. One gradient per step.

    Attributes:
        step_size: time step h.
        friction: rate at which momentum is forgotten; near the frequency of the slowest direction is best.
    """

    step_size: float
    friction: float

    @classmethod
    def tuned(cls, slow: float, fast: float, **options: Any) -> Self:
        """step_size * (highest frequency) = 1, friction = lowest frequency."""
        return cls(1 / math.sqrt(fast), **{"friction": math.sqrt(slow)} | options)

    def relaxation(self, slow: float) -> float:
        """Amplitudes decay at friction/2 (oscillating) or slow/friction (creeping), whichever is slower."""
        rate = min(self.friction / 2, slow / self.friction)
        return 1 / (rate * self.step_size)

    def heating(self, noise: float, fast: float, correlation: Tensor) -> float:
        """step_size noise / (2 friction) for noise that is new at every step; other noise at the motion's frequency."""
        phases = self.step_size * math.sqrt(fast) * torch.arange(1, len(correlation) + 1, dtype=torch.float64)
        at_frequency = 1 + 2 * float(correlation @ phases.cos())
        return self.step_size * noise * at_frequency / (2 * self.friction)

    def init(self, position: Tensor, generator: Source) -> UnderdampedState:
        """Start at ``position`` with momenta drawn from their stationary law."""
        momentum = standard_normal(position, generator)
        return UnderdampedState(position, momentum)

    def step(self, state: UnderdampedState, gradient: GradientFunction, generator: Source) -> UnderdampedState:
        """One BAOAB step of every chain."""
        h, p = self.step_size, state.momentum
        u = (h / 2 * p).add_(state.position)
        del state  # of large models every copy counts
        noise = standard_normal(p, generator)
        keep = math.exp(-self.friction * h)
        p = (keep * p).add_(noise.mul_(math.sqrt(1 - keep**2)))
        del noise
        u.add_(h / 2 * p)
        half = gradient(u).potential.mul_(h / 2)
        return UnderdampedState(u, p.sub_(half).sub_(half))

    def freeze(self, state: UnderdampedState) -> UnderdampedState:
        """Nothing adapts."""
        return state
