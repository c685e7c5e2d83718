"""SGLD with RMSprop's elementwise step sizes (Li et al. 2016, arXiv 1512.07666)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from stagewise.sampling.base import GradientFunction, Source, standard_normal
from stagewise.sampling.sgld import heating


class RMSpropSGLDState(NamedTuple):
    """Where every chain is, and the metric it has learnt.

    Attributes:
        position: of every chain ``(chain, parameters)``.
        second_moment: running mean of squared minibatch gradients of the mean loss ``(chain, parameters)``.
        updates: how many gradients have entered it.
        frozen: whether it has stopped adapting.
    """

    position: Tensor
    second_moment: Tensor
    updates: int
    frozen: bool


@dataclass(frozen=True)
class RMSpropSGLD:
    """SGLD whose step size adapts to each parameter in the first half of burn-in and is frozen from there on.

        V_t   = decay V_(t-1) + (1 - decay) g_t^2            g: gradient of the mean minibatch loss
        eps_t = step_size / (sqrt(V_hat) + stability)
        u'    = u - (eps_t/2) grad U(u) + sqrt(eps_t) noise

    With V frozen the target is the same as SGLD's: preconditioning changes how fast chains mix, not what they
    sample. While V adapts, without Li et al.'s correction term, the law is another.

    Attributes:
        step_size: epsilon, before division.
        decay: of the running mean.
        stability: added to sqrt(V); gradients much smaller than it make this plain SGLD with
            step_size / stability.
        start: V before the first gradient. Both are divided by 1 - decay^t after t gradients, which makes the
            first steps from 1 short.
    """

    step_size: float
    decay: float = 0.99
    stability: float = 0.1
    start: Literal[0, 1] = 0

    @classmethod
    def tuned(cls, slow: float, fast: float, **options: Any) -> Self:
        """Safe for any V: the longest elementwise step, step_size / stability, times ``fast`` is 0.1."""
        del slow
        return cls(0.1 / fast * options.get("stability", cls.stability), **options)

    def relaxation(self, slow: float) -> float:
        """As for SGLD at the longest elementwise step; larger gradients make it slower."""
        return 2 * self.stability / (self.step_size * slow)

    def heating(self, noise: float, fast: float, correlation: Tensor) -> float:
        """As for SGLD at the longest elementwise step."""
        return heating(self.step_size / self.stability, noise, fast, correlation)

    def init(self, position: Tensor, generator: Source) -> RMSpropSGLDState:
        """Start at ``position`` with V = ``start``."""
        del generator
        return RMSpropSGLDState(position, torch.full_like(position, float(self.start)), 0, False)

    def step(self, state: RMSpropSGLDState, gradient: GradientFunction, generator: Source) -> RMSpropSGLDState:
        """One preconditioned Euler step of every chain."""
        u, v, updates, frozen = state
        del state  # of large models every copy counts
        slope, loss = gradient(u)
        if not frozen:
            v = (self.decay * v).add_((loss**2).mul_(1 - self.decay))
            updates = updates + 1
        del loss
        # Frozen before the first gradient (no burn-in), V stays what it started as.
        corrected = v / (1 - self.decay**updates) if updates else v.clone()
        eps = corrected.sqrt_().add_(self.stability).reciprocal_().mul_(self.step_size)
        moved = slope.mul_(eps / -2).add_(u)
        noise = standard_normal(u, generator)
        return RMSpropSGLDState(moved.add_(noise.mul_(eps.sqrt_())), v, updates, frozen)

    def freeze(self, state: RMSpropSGLDState) -> RMSpropSGLDState:
        """Stop adapting V."""
        return state._replace(frozen=True)
