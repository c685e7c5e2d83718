"""Stochastic-gradient Langevin dynamics (Welling & Teh 2011)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from stagewise.sampling.base import GradientFunction, Source, standard_normal


class SGLDState(NamedTuple):
    """Position of every chain ``(chain, parameters)``."""

    position: Tensor


def heating(step_size: float, noise: float, fast: float, correlation: Tensor) -> float:
    """:meth:`Langevin.heating` of an Euler step."""
    kept = (1 - step_size * fast / 2) ** torch.arange(1, len(correlation) + 1, dtype=torch.float64)
    return step_size * noise * (1 + 2 * float(correlation @ kept)) / 4


@dataclass(frozen=True)
class SGLD:
    """Overdamped Langevin dynamics by the Euler scheme.

        u' = u - (step_size/2) grad U(u) + sqrt(step_size) noise

    A direction of precision ``lam`` is stable for step_size * lam < 4; its variance comes out too large by
    the factor 1 / (1 - step_size * lam / 4).

    Attributes:
        step_size: epsilon.
    """

    step_size: float

    @classmethod
    def tuned(cls, slow: float, fast: float, **options: Any) -> Self:
        """step_size * fast = 0.1: the variance of the stiffest direction is 2.6 per cent too large."""
        del slow
        return cls(0.1 / fast, **options)

    def relaxation(self, slow: float) -> float:
        """A deviation decays by the factor 1 - step_size * slow / 2 each step."""
        return 2 / (self.step_size * slow)

    def heating(self, noise: float, fast: float, correlation: Tensor) -> float:
        """step_size noise / 4 for noise that is new at every step; other noise as far as a direction remembers it."""
        return heating(self.step_size, noise, fast, correlation)

    def init(self, position: Tensor, generator: Source) -> SGLDState:
        """Start at ``position``."""
        del generator
        return SGLDState(position)

    def step(self, state: SGLDState, gradient: GradientFunction, generator: Source) -> SGLDState:
        """One Euler step of every chain."""
        u = state.position
        moved = gradient(u).potential.mul_(-self.step_size / 2).add_(u)
        noise = standard_normal(u, generator)
        return SGLDState(moved.add_(noise.mul_(self.step_size**0.5)))

    def freeze(self, state: SGLDState) -> SGLDState:
        """Nothing adapts."""
        return state
