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
from torch import Tensor

from stagewise.derivatives import Product, hessian_product
from stagewise.evaluate import represented
from stagewise.sampling.base import GradientFunction, Source, standard_normal
from stagewise.sampling.curvature import Curvature
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

    Where decoupled decay or the counts of Adam's moments differ between parameters f(H) is not symmetric, and has no
    root: those of most parameters stand for all, see :meth:`FrozenUpdates.along`.

    Attributes:
        hessian: products with H, the whitened Hessian of the mean loss of the samples that represent the training set.
        updates: of the window.
        n_beta: inverse temperature times the number of samples.
    """

    hessian: Product
    updates: FrozenUpdates
    n_beta: float
    step_size: None = None

    @classmethod
    def of(cls, density: LocalDensity) -> Self:
        """That of a window after a checkpoint whose optimiser is recorded."""
        hessian = hessian_product(density, density.origin, represented(density))
        return cls(hessian, FrozenUpdates.of(density), density.n_beta)

    def refused(self, window: int | None, curvature: Curvature) -> str:
        """Why there is no such law: along some direction the updates run away. Empty where they do not.

        The response to a few gradients may hide that direction; draws go along all of them.
        """
        stiffest = curvature.largest + float(self.updates.pull.max()) / self.updates.clip
        ends = torch.tensor([curvature.smallest, stiffest, 0.0], dtype=torch.float64)
        *reach, flat = self.updates.along(ends).abs().nan_to_num(nan=torch.inf).tolist()
        return runaway(window, max(reach) / flat)

    def draw(self, count: int, like: Tensor, generator: Source) -> Tensor:
        """Independent displacements ``(count, parameters)``, ``like`` one."""
        noise = standard_normal(like.expand(count, -1), generator)
        return applied(self._root, self._product, noise, _TOLERANCE).div_(self.n_beta**0.5)

    def _product(self, vectors: Tensor) -> Tensor:
        """Weight decay that enters through the gradient is a curvature."""
        return self.hessian(vectors).addcmul_(vectors, self.updates.pull / self.updates.clip)

    def _root(self, curvatures: Tensor) -> Tensor:
        return self.updates.along(curvatures).clamp(min=0).sqrt()

    def init(self, position: Tensor, generator: Source) -> WindowGaussianState:
        """Nothing to prepare."""
        del generator
        return WindowGaussianState(position)

    def step(self, state: WindowGaussianState, gradient: GradientFunction, generator: Source) -> WindowGaussianState:
        """A new draw of every chain."""
        del gradient
        count, like = len(state.position), state.position[0]
        return WindowGaussianState(self.draw(count, like, generator))

    def freeze(self, state: WindowGaussianState) -> WindowGaussianState:
        """Nothing adapts."""
        return state
