"""Chains of the posterior's quadratic form, moved by the noise and the minibatches of the chains of the posterior.

    U_G(u) = n_beta (u.H u / 2 [+ g.u]) + gamma |u|^2 / 2,

so that u_G has the covariance (n_beta H + gamma)^-1, and stays as close to u as the loss is to its quadratic form. What
the losses do along u_G to first order has a covariance that is known without sampling, and nearly the noise of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor

from stagewise.derivatives import Product, hessian_product
from stagewise.evaluate import sample_weights
from stagewise.sampling.base import Gradient, GradientFunction
from stagewise.sampling.block import Block
from stagewise.sampling.gradient import Turns, full_gradient, of_potential, reshuffled
from stagewise.sampling.noise import generator
from stagewise.sampling.posterior import LocalDensity
from stagewise.sampling.tuning import Tuning

if TYPE_CHECKING:
    from stagewise.sampling.chains import Chains


class Coupled:
    """The coupled chains of a block, step for step with its own.

    Args:
        tuning: the posterior, and the sampler that was chosen for it.
        sampling: what was asked for.
        block: which block; its noise and its minibatches are drawn again.
        taken: steps that were taken before.
    """

    def __init__(self, tuning: Tuning, sampling: Chains, block: int, taken: int) -> None:
        density, chains = tuning.density, sampling.chains
        self._noise, minibatches = (
            generator(sampling.seed, block, use, density.anchor.device) for use in ("noise", "batch")
        )
        gradient = quadratic_gradient(density, chains, tuning.batch_size, minibatches, taken)
        self.chains = Block(density, tuning.sampler, gradient, self._noise, chains, tuning.batching == "loop")

    def state(self) -> dict[str, Any]:
        """As that of the block's own chains."""
        return {"noise": self._noise.get_state(), "chains": self.chains.state()}

    def go_on(self, kept: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self._noise.set_state(kept["noise"])
        self.chains.go_on(kept["chains"])


def quadratic_gradient(
    density: LocalDensity, chains: int, batch_size: int | None, generator: Generator, taken: int = 0
) -> GradientFunction:
    """The gradient of U_G, on the minibatches of :func:`potential_gradient` with its control variate.

    Args:
        density: the posterior.
        chains: number of chains.
        batch_size: samples per minibatch; None is the whole training set.
        generator: draws the minibatches.
        taken: steps of all chains that were taken before; theirs are passed over.
    """
    count = len(density.task.train)
    still = None if density.posterior.centred else -full_gradient(density)
    if batch_size is None or batch_size >= count:
        whole = hessian_product(density, density.origin)
        return lambda u: of_potential(density, u, whole(u), still)
    indices, turn, current = reshuffled(count, batch_size, generator), Turns(chains), list[Product]()
    for _ in range(taken):
        next(indices)

    def quadratic(u: Tensor) -> Gradient:
        if turn(len(u)).start == 0:
            current[:] = [_product(density, next(indices))]
        return of_potential(density, u, current[0](u), still)

    return quadratic


def _product(density: LocalDensity, rows: Tensor) -> Product:
    """With the Hessian of :class:`BatchLoss`, which weighs a batch by the mean weight of all samples."""
    weights, product = sample_weights(density), hessian_product(density, density.origin, rows)
    share = float(weights[rows].mean() / weights.mean())
    return product if share == 1 else lambda vectors: product(vectors).mul_(share)
