"""Chains on their way: burn in, then draw; and all that another process needs to go on from where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagewise.derivatives import mean_gradient
from stagewise.evaluate import represented
from stagewise.sampling.block import Block
from stagewise.sampling.coupled import Coupled
from stagewise.sampling.gradient import potential_gradient
from stagewise.sampling.noise import generator, noise_source
from stagewise.sampling.posterior import LocalDensity
from stagewise.sampling.tuning import Tuning
from stagewise.sampling.watch import Seen, Watch

if TYPE_CHECKING:
    from stagewise.sampling.chains import Chains

# The localisation alone keeps gamma u^2 at 1 in every direction; a chain at a multiple of that has diverged.
_DIVERGED = 10.0

State = dict[str, Any]
"""Tensors, numbers, and lists and dictionaries of them."""


class Underway(Protocol):
    """Where chains are kept while they are under way, so that a killed process does not lose them."""

    def load(self) -> State | None:
        """What was kept; None if nothing was."""
        ...

    def keep(self, state: Callable[[], State]) -> None:
        """Called after every step: keep the state, if it is time to."""
        ...


class Drawing:
    """The chains of a block, from the checkpoint to their last draw.

    Args:
        tuning: the posterior, and the sampler that was chosen for it.
        sampling: what was asked for.
        block: which block; it seeds the noise together with ``sampling.seed``.
        kept: a state of these chains to go on from; the same bits come of it.
    """

    def __init__(self, tuning: Tuning, sampling: Chains, block: int, kept: State | None = None) -> None:
        density = tuning.density
        self.done = 0 if kept is None else kept["done"]
        self._tuning = tuning
        noise = noise_source(density, sampling.seed, block, "noise", sampling.chains)
        minibatches = generator(sampling.seed, block, "batch", density.anchor.device)
        gradient = potential_gradient(
            density,
            sampling.chains,
            tuning.batch_size,
            sampling.control_variate,
            tuning.batching,
            minibatches,
            self.done,
        )
        self._noise, self._alive = noise, torch.ones(sampling.chains, dtype=torch.bool, device=density.anchor.device)
        self._chains = Block(density, tuning.sampler, gradient, noise, sampling.chains, tuning.batching == "loop")
        self._coupled = None
        if sampling.linear and sampling.sampler != "window":  # whose draws have a law that is known
            self._coupled = Coupled(tuning, sampling, block, self.done)
        self._watch = Watch(
            density, tuning.batching, sampling.reflect, sampling.single_tokens, sampling.linear, sampling.looks
        )
        self._along: list[Tensor] = []
        self._farthest = _farthest(density, tuning.slow)
        if kept is not None:
            self._go_on(kept)

    def step(self) -> None:
        """One transition of every chain, and a draw where one is due."""
        tuning, since = self._tuning, self.done - self._tuning.burn_in
        if since == -(tuning.burn_in // 2):
            self._chains.freeze()
        if self._alive.any():
            self._chains.step()
            self._alive &= self._chains.squared_distance() < self._farthest  # also False for NaN
            if self._coupled is not None:
                self._coupled.chains.step()
                self._alive &= self._coupled.chains.squared_distance() < self._farthest
        if since >= 0 and (since + 1) % tuning.thinning == 0:
            coupled = None if self._coupled is None else self._coupled.chains.places(self._alive)
            self._alive &= self._watch.draw(self._chains.places(self._alive), coupled)
            if tuning.curvature is not None:
                self._along.append(self._chains.along(tuning.curvature.softest))
        self.done += 1

    def traces(self) -> dict[str, Seen]:
        """What the chains saw, by data set."""
        return self._watch.traces()

    def status(self) -> NDArray[np.str_]:
        """How every chain ended ``(chain,)``."""
        return np.where(self._alive.cpu(), "ok", "diverged")

    def soft_spread(self) -> NDArray[np.float64]:
        """Of every chain, from its displacements along the softest direction; NaN where that is not known."""
        alive, slow = self._alive.cpu(), self._tuning.slow
        if not self._along or slow is None:
            return np.full(len(alive), np.nan)
        soft = torch.stack(self._along, 1).double().cpu()
        spread = slow * (soft - soft[alive].mean()).square().mean(1)
        return torch.where(alive, spread, torch.nan).numpy()

    def state(self) -> State:
        """Everything that is not made again from the task, the checkpoint and the settings."""
        return {
            "done": self.done,
            "alive": self._alive,
            "noise": self._noise.get_state(),
            "chains": self._chains.state(),
            "coupled": None if self._coupled is None else self._coupled.state(),
            "draws": self._watch.state(),
            "along": self._along,
        }

    def _go_on(self, kept: State) -> None:
        device = self._alive.device
        self._alive = kept["alive"].to(device)
        self._noise.set_state(kept["noise"])
        self._chains.go_on(kept["chains"])
        if self._coupled is not None:
            self._coupled.go_on(kept["coupled"])
        self._watch.go_on(kept["draws"])
        self._along = [part.to(device) for part in kept["along"]]


def _farthest(density: LocalDensity, slow: float | None) -> float:
    """Squared distance from the checkpoint that no chain of this posterior reaches; independent draws know no limit.

    Generous enough for every quantile of the stationary law: a chi-square of all directions, one of them as
    soft as ``slow``, about a centre as far downhill as the gradient can push it.
    """
    if slow is None:
        return torch.inf
    spread = _DIVERGED * (density.vector.count / density.gamma + 4 / slow)
    if density.posterior.centred:
        return spread
    rows = represented(density)  # a bound needs no more
    pull = density.task.ranks.norm(mean_gradient(density, density.origin, density.task.train, rows))
    return spread + _DIVERGED * float(density.n_beta * pull / slow) ** 2
