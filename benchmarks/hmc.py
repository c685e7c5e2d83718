"""Hamiltonian Monte Carlo with a Metropolis test, for small models: draws without an error of step size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vmap

from stagewise.derivatives import mean_gradient
from stagewise.differentiate import differentiable, gradient
from stagewise.evaluate import sample_weights
from stagewise.sampling.posterior import LocalDensity

_STEP = 0.8  # times the highest frequency
_BURN_IN = 5  # trajectories, each about a quarter of the slowest period


class Potential:
    """U of a local posterior on all training samples, and its gradient, for many chains at once."""

    def __init__(self, density: LocalDensity) -> None:
        task = density.task
        self._density, self._batch = density, task.train.batch(slice(None), task.device)
        self._weights = (sample_weights(density) / sample_weights(density).sum()).to(density.anchor)
        slope = mean_gradient(density, density.origin, task.train)
        self._tilt = slope if density.posterior.centred else torch.zeros_like(slope)

    def loss(self, u: Tensor) -> Tensor:
        """Mean training loss at one place, less its slope at the checkpoint where the posterior is centred."""
        return self._weights @ self._density.sample_losses(u, self._batch)[0] - self._tilt @ u

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """At ``u (chain, parameters)``: U ``(chain,)``, float64, and its gradient ``(chain, parameters)``."""
        density = self._density
        with differentiable(u) as leaf:
            losses = vmap(self.loss)(leaf)
            slope = gradient(losses.sum(), leaf)
        value = density.n_beta * losses.detach().double() + density.gamma / 2 * u.double().square().sum(1)
        return value, density.n_beta * slope + density.gamma * u


class Drawn(NamedTuple):
    """Positions ``(chain, draw, parameters)``, share of trajectories that were accepted, gradients made."""

    positions: Tensor
    accepted: float
    gradients: int


def hmc(density: LocalDensity, slow: float, fast: float, chains: int, draws: int, generator: Generator) -> Drawn:
    """Draws of the posterior, one per trajectory.

    Args:
        density: the posterior.
        slow: its lowest precision.
        fast: its highest.
        chains: how many.
        draws: of each.
        generator: of all that is random.
    """
    potential, step = Potential(density), _STEP / math.sqrt(fast)
    quarter = math.pi / 2 / math.sqrt(slow) / step
    u = torch.zeros(chains, density.vector.size).to(density.anchor)
    energy, slope = potential(u)
    kept, accepted, gradients = [], 0.0, 0
    for trajectory in range(-_BURN_IN, draws):
        count = round(quarter * (0.75 + 0.5 * float(torch.rand((), generator=generator))))
        p = torch.randn(u.shape, generator=generator, dtype=u.dtype)
        before = energy + p.double().square().sum(1) / 2
        there, at_end, force = u, energy, slope
        for _ in range(count):
            p = p - step / 2 * force
            there = there + step * p
            at_end, force = potential(there)
            p = p - step / 2 * force
        after = at_end + p.double().square().sum(1) / 2
        yes = torch.rand(chains, generator=generator, dtype=torch.float64) < (before - after).exp()
        yes |= trajectory < 0  # from the checkpoint, where there is less energy than anywhere, none would pass
        u, slope, energy = there.where(yes[:, None], u), force.where(yes[:, None], slope), at_end.where(yes, energy)
        gradients += count * chains
        if trajectory >= 0:
            kept.append(u)
            accepted += float(yes.double().mean()) / draws
    return Drawn(torch.stack(kept, 1), accepted, gradients)
