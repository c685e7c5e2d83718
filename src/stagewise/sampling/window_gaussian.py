"""Independent draws from the window's own Gaussian: the law whose covariance is the optimiser's response.

    u = f(H)^(1/2) xi / sqrt(n_beta),        xi ~ N(0, 1)

f(H) is what a window's updates make of a held gradient at fixed curvature, of either sign; 1 / (H + damping), the
covariance of the local posterior, only stands for it. The root is applied by Lanczos. Where f is negative, as along
curvature for which the updates are too long, it counts as 0: a covariance cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Generator, Tensor

from stagewise.derivatives import Product, hessian_product, mean_gradient
from stagewise.evaluate import represented
from stagewise.sampling.base import GradientFunction
from stagewise.sampling.frozen_updates import FrozenUpdates, runaway
from stagewise.sampling.krylov import applied
from stagewise.sampling.posterior import LocalDensity

# Of the length of a draw; a thousand draws leave 3 % of a covariance to chance.
_TOLERANCE = 1e-3


class WindowGaussianState(NamedTuple):
    """The last draw of every chain ``(chain, parameters)``."""

    position: Tensor


@dataclass(frozen=True, eq=False)
class WindowGaussian:
    """Every step is a new draw, whatever was before.

    Attributes:
        curvature: H, the whitened Hessian of the mean loss of the samples that represent the training set.
        updates: of the window.
        n_beta: inverse temperature times the number of samples.
    """

    curvature: Product
    updates: FrozenUpdates
    n_beta: float
    step_size: None = None

    @classmethod
    def of(cls, density: LocalDensity) -> Self:
        """That of a window after a checkpoint whose optimiser is recorded."""
        curvature = hessian_product(density, density.origin, represented(density))
        return cls(curvature, FrozenUpdates.of(density), density.n_beta)

    def refused(self, density: LocalDensity) -> str:
        """Why the window has no such law, as the response has none: its updates run away; else empty.

        They are asked of the gradient of the mean loss of the training data, and of every query set.
        """
        task = density.task
        slopes = [mean_gradient(density, density.origin, task.train)]
        slopes += [mean_gradient(density, density.origin, data, query=name) for name, data in task.queries.items()]
        gradients = torch.stack(slopes)
        return runaway(density, gradients, self.updates.respond(self.curvature, gradients))

    def draw(self, count: int, like: Tensor, generator: Generator) -> Tensor:
        """Independent displacements ``(count, parameters)``, ``like`` one."""
        noise = torch.randn(count, len(like), generator=generator, dtype=like.dtype, device=like.device)
        return applied(self._root, self._product, noise, _TOLERANCE).div_(self.n_beta**0.5)

    def _product(self, vectors: Tensor) -> Tensor:
        """Weight decay that enters through the gradient is a curvature."""
        return self.curvature(vectors).addcmul_(vectors, self.updates.pull / self.updates.clip)

    def _root(self, curvatures: Tensor) -> Tensor:
        return self.updates.along(curvatures).clamp(min=0).sqrt()

    def init(self, position: Tensor, generator: Generator) -> WindowGaussianState:
        """Nothing to prepare."""
        del generator
        return WindowGaussianState(position)

    def step(self, state: WindowGaussianState, gradient: GradientFunction, generator: Generator) -> WindowGaussianState:
        """A new draw of every chain."""
        del gradient
        count, like = len(state.position), state.position[0]
        return WindowGaussianState(self.draw(count, like, generator))

    def freeze(self, state: WindowGaussianState) -> WindowGaussianState:
        """Nothing adapts."""
        return state
