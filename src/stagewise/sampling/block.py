"""The chains of a block on their way: in one tensor, or every chain in its own where the model is large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.memory import give_back
from stagewise.sampling.base import GradientFunction, Sampler, Source
from stagewise.sampling.posterior import LocalDensity

_MOST_NUMBERS = 2**22
"""In the positions of all chains, up to which looped chains move together. What is computed on the way (gradients,
noise) is a few times as large; of chains that move one by one it is needed for one of them only."""


def move_apart(chains: int, parameters: int) -> bool:
    """Whether looped chains of so many parameters move one by one."""
    return chains * parameters > _MOST_NUMBERS


class Block:
    """Chains from the checkpoint on.

    Args:
        density: the posterior.
        sampler: how they move.
        gradient: of the potential, see :func:`stagewise.sampling.gradient.potential_gradient`.
        noise: of the chains.
        chains: how many.
        apart: whether they may move one by one.
    """

    def __init__(
        self,
        density: LocalDensity,
        sampler: Sampler,
        gradient: GradientFunction,
        noise: Source,
        chains: int,
        apart: bool,
    ) -> None:
        self._sampler, self._gradient, self._noise, self._ranks = sampler, gradient, noise, density.task.ranks
        sizes = [1] * chains if apart and move_apart(chains, density.vector.count) else [chains]
        self._states: list[Any] = [sampler.init(density.origin.repeat(size, 1), noise) for size in sizes]

    def step(self) -> None:
        """One transition of every chain."""
        for _ in range(len(self._states)):  # in turn; what a state held is free as soon as its step needs it no more
            if len(self._states) > 1:
                give_back()
            self._states.append(self._sampler.step(self._states.pop(0), self._gradient, self._noise))

    def freeze(self) -> None:
        """Stop all adaptation."""
        self._states = [self._sampler.freeze(state) for state in self._states]

    def squared_distance(self) -> Tensor:
        """Of every chain from the checkpoint ``(chain,)``."""
        return torch.cat([self._ranks.dot(state.position, state.position) for state in self._states])

    def along(self, direction: Tensor) -> Tensor:
        """Displacement of every chain along a direction ``(chain,)``."""
        return torch.cat([self._ranks.along(state.position, direction) for state in self._states])

    def places(self, alive: Tensor) -> Tensor | Sequence[Tensor]:
        """The position of every chain ``(chain, parameters)``; that of the checkpoint for those that are lost."""
        if len(self._states) == 1:
            return torch.where(alive[:, None], self._states[0].position, 0.0)
        kept = zip(self._states, alive.tolist(), strict=True)
        return [state.position[0] if there else torch.zeros_like(state.position[0]) for state, there in kept]

    def state(self) -> list[dict[str, Any]]:
        """The fields of every state."""
        return [state._asdict() for state in self._states]

    def go_on(self, kept: Sequence[dict[str, Any]]) -> None:
        """Take up what :meth:`state` gave, of chains like these."""
        like = self._states[0]
        self._states = [
            type(like)(
                **{name: part.to(like.position) if isinstance(part, Tensor) else part for name, part in of.items()}
            )
            for of in kept
        ]
