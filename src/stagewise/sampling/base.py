"""What a sampler is: an initial state and a step, on chains of whitened displacements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Generator, Tensor


class Gradient(NamedTuple):
    """A (stochastic) gradient at the current position of every chain.

    Attributes:
        potential: of U = n_beta L + (gamma/2)|u|^2, the negative log density ``(chain, parameters)``. A tensor of its
            own, in which the sampler may go on computing: of large models every copy costs memory and time.
        loss: of the mean loss of the minibatch alone ``(chain, parameters)``; what RMSprop's metric averages.
    """

    potential: Tensor
    loss: Tensor


GradientFunction = Callable[[Tensor], Gradient]
"""Positions ``(chain, parameters)`` to their gradient; every call may draw a fresh minibatch."""


class Noise(Protocol):
    """Where chains have their noise from, if not from a generator: see :mod:`stagewise.sampling.row_noise`."""

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers for the next chains ``(chain, parameters)``."""
        ...

    def get_state(self) -> Tensor:
        """How far it has come."""
        ...

    def set_state(self, state: Tensor) -> object:
        """Go on from there."""
        ...


Source = Generator | Noise


def standard_normal(like: Tensor, source: Source) -> Tensor:
    """Noise of the shape, type and device of ``like (chain, parameters)``."""
    if isinstance(source, Generator):
        return torch.randn(like.shape, generator=source, dtype=like.dtype, device=like.device)
    return source.normal(like)


class Sampler(Protocol):
    """How chains move. ``step`` is pure: a new state, noise from ``generator``, and nothing else is touched."""

    @property
    def step_size(self) -> float | None:
        """Length of a step, in the sampler's own units; None where steps have no length."""
        ...

    def init(self, position: Tensor, generator: Source) -> Any:
        """The state of chains that start at ``position`` ``(chain, parameters)``."""
        ...

    def step(self, state: Any, gradient: GradientFunction, generator: Source) -> Any:
        """One transition of every chain."""
        ...

    def freeze(self, state: Any) -> Any:
        """The state with all adaptation stopped; called once, halfway through burn-in.

        While it adapts a chain has another law, which the second half of burn-in lets it forget.
        """
        ...


class Langevin(Sampler, Protocol):
    """A Markov chain that leaves exp(-U) invariant, up to its step-size error."""

    @property
    def step_size(self) -> float:
        """Length of a step, in the sampler's own units."""
        ...

    @classmethod
    def tuned(cls, slow: float, fast: float, **options: float) -> Self:
        """The sampler for a density whose precisions range from ``slow`` to ``fast``, with ``options`` as they are."""
        ...

    def relaxation(self, slow: float) -> float:
        """Steps in which a direction of precision ``slow`` forgets its position (by a factor of about e)."""
        ...

    def heating(self, noise: float, fast: float, correlation: Tensor) -> float:
        """Share of the variance of a direction that the noise of gradients adds, at most.

        Args:
            noise: variance of the gradient of U along the direction.
            fast: the largest precision, whose direction forgets least of the noise of one step by the next.
            correlation: of the noises of two gradients 1, 2, ... steps apart.
        """
        ...
