"""Hamiltonian Monte Carlo with a Metropolis test, for small models: draws without an error of step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vmap

from stagewise.derivatives import mean_gradient
from stagewise.differentiate import differentiable, gradient
from stagewise.evaluate import sample_weights
from stagewise.sampling.posterior import LocalDensity

_STEP = 0.4  # times the highest frequency
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


class Quadratic:
    """U of a Gaussian with a precision matrix, and its gradient."""

    def __init__(self, precision: Tensor) -> None:
        self._precision = precision

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """At ``u (chain, parameters)``: as :class:`Potential`."""
        slope = u @ self._precision
        return (u * slope).double().sum(1) / 2, slope


Law = Callable[[Tensor], tuple[Tensor, Tensor]]


class Drawn(NamedTuple):
    """Positions ``(chain, draw, parameters)``, share of trajectories that were accepted, gradients made."""

    positions: Tensor
    accepted: float
    gradients: int


def hmc(laws: Sequence[Law], start: Tensor, slow: float, fast: float, draws: int, generator: Generator) -> list[Drawn]:
    """Draws of every law, one per trajectory, all by the same random numbers: of like laws they are alike.

    Args:
        laws: potential and gradient at ``(chain, parameters)``.
        start: of the chains ``(chain, parameters)``.
        slow: the lowest precision.
        fast: the highest.
        draws: of each chain.
        generator: of all that is random.
    """
    step = _STEP / math.sqrt(fast)
    quarter = math.pi / 2 / math.sqrt(slow) / step
    states: list[State] = [(start, *law(start)) for law in laws]
    kept: list[list[Tensor]] = [[] for _ in laws]
    accepted, gradients = [0.0] * len(laws), 0
    for trajectory in range(-_BURN_IN, draws):
        count = round(quarter * (0.75 + 0.5 * float(torch.rand((), generator=generator))))
        momentum = torch.randn(start.shape, generator=generator, dtype=start.dtype)
        level = torch.rand(len(start), generator=generator, dtype=torch.float64)
        gradients += count * len(start)
        for k, law in enumerate(laws):
            end, gained = moved(law, states[k], momentum, step, count)
            # From the checkpoint, where there is less energy than anywhere, none would pass.
            yes = (level < gained.exp()) | (trajectory < 0)
            states[k] = tuple(
                new.where(yes.view(-1, *[1] * (new.ndim - 1)), old) for new, old in zip(end, states[k], strict=True)
            )
            if trajectory >= 0:
                kept[k].append(states[k][0])
                accepted[k] += float(yes.double().mean()) / draws
    return [Drawn(torch.stack(one, 1), share, gradients) for one, share in zip(kept, accepted, strict=True)]


State = tuple[Tensor, ...]
"""Position, potential and its gradient."""


def moved(law: Law, state: State, p: Tensor, step: float, count: int) -> tuple[State, Tensor]:
    """The end of a trajectory, and the energy that it lost ``(chain,)``."""
    u, before, force = state
    before, after = before + p.double().square().sum(1) / 2, before
    for _ in range(count):
        p = p - step / 2 * force
        u = u + step * p
        after, force = law(u)
        p = p - step / 2 * force
    return (u, after, force), before - after - p.double().square().sum(1) / 2
