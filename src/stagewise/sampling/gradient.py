"""The gradient that drives the chains: minibatches, the control variate, and chains evaluated together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Generator, Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from stagewise.data import Batch
from stagewise.evaluate import (
    Batching,
    chunks,
    differentiable,
    gradient,
    mean_gradient,
    over_rows,
    sample_weights,
    slope_at,
)
from stagewise.sampling.base import Gradient, GradientFunction
from stagewise.sampling.posterior import LocalDensity


def full_gradient(density: LocalDensity) -> Tensor:
    """Gradient of the mean training loss at the checkpoint in whitened coordinates ``(parameters,)``."""
    return mean_gradient(density, density.origin, density.task.train)


class BatchLoss:
    """The map from a displacement ``(parameters,)`` and a batch to its estimate of the mean training loss, nats.

    It is  sum_i a_i l_i / (m mean(a)):  without bias whatever samples are drawn, where the mean over the batch's own
    weights would have one.
    """

    def __init__(self, density: LocalDensity) -> None:
        self._density, self._mean_weight = density, float(sample_weights(density).mean())

    def __call__(self, u: Tensor, batch: Batch) -> Tensor:
        """At one place."""
        return self._of(self._density.params(u), batch)

    def gradient(self, u: Tensor, batch: Batch) -> Tensor:
        """At one place, ``(parameters,)``."""
        return slope_at(self._density, u, lambda params: self._of(params, batch))

    def _of(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        losses, weights = self._density.task.sample_losses(params, batch)
        return (weights * losses).sum() / (len(losses) * self._mean_weight)


def chain_gradients(loss: BatchLoss, batching: Batching) -> Callable[[Tensor, Batch], Tensor]:
    """The gradient of ``loss(u, batch)`` of every chain, on one batch: ``(chain, parameters)``.

    Stacked chains share one backward pass: no chain's loss depends on another's position, so that the gradient of their
    sum is the gradient of each. One layer of batching is less work than the batched gradient of a single chain.
    """

    def apply(u: Tensor, batch: Batch) -> Tensor:
        if batching == "loop":
            return _rows([loss.gradient(row, batch) for row in u])
        with differentiable(u) as leaf:
            return gradient(over_rows(lambda row: loss(row, batch), leaf, batching).sum(), leaf)

    return apply


def _rows(rows: list[Tensor]) -> Tensor:
    """As one tensor; a single one is not copied."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _own_gradients(loss: BatchLoss, batching: Batching) -> Callable[[Tensor, list[Batch]], Tensor]:
    """The same, every chain on a batch of its own; stacked where the batches are tensors of equal shapes."""

    def apply(u: Tensor, batches: list[Batch]) -> Tensor:
        flat = [tree_flatten(batch)[0] for batch in batches]
        same = all(
            isinstance(leaf, Tensor) and leaf.shape == first.shape
            for leaves in flat
            for leaf, first in zip(leaves, flat[0], strict=False)
        )
        if batching == "loop" or not same:
            return _rows([loss.gradient(row, batch) for row, batch in zip(u, batches, strict=True)])
        stacked = tree_map(lambda *leaves: torch.stack(leaves), *batches)
        with differentiable(u) as leaf:
            return gradient(vmap(loss)(leaf, stacked).sum(), leaf)

    return apply


def reshuffled(n: int, size: int, generator: Generator) -> Iterator[Tensor]:
    """Endless minibatches of sample indices without replacement, freshly permuted each epoch.

    Sampling without replacement lets the minibatch noise cancel over an epoch, which heats the slow
    directions far less than independent batches do.
    """
    while True:
        order = torch.randperm(n, generator=generator)
        yield from (order[i : i + size] for i in range(0, n - size + 1, size))


def exact_gradient(density: LocalDensity, batching: Batching, rows: Tensor | None = None) -> GradientFunction:
    """The gradient of U for a block of chains without noise, on some training samples, default all."""
    train = density.task.train
    rows = torch.arange(len(train)) if rows is None else rows
    per_chain = chain_gradients(BatchLoss(density), batching)
    batches = list(chunks(density.task, train, rows))
    shares = [min(density.task.forward_batch, len(rows)) / len(rows)] * len(batches)
    shares[-1] = 1 - sum(shares[:-1])

    def loss_gradient(u: Tensor) -> Tensor:
        total = torch.zeros_like(u)
        for share, batch in zip(shares, batches, strict=True):
            total += share * per_chain(u, batch)
        return total

    anchor_gradient = loss_gradient(density.origin[None]) if density.posterior.centred else None

    def exact(u: Tensor) -> Gradient:
        return _of_potential(density, u, loss_gradient(u), anchor_gradient)

    return exact


def _of_potential(density: LocalDensity, u: Tensor, slope: Tensor, still: Tensor | None) -> Gradient:
    """n_beta (slope - still) + gamma u, in few vectors; ``still`` is what does not count of the slope."""
    drift = slope.clone() if still is None else slope - still
    return Gradient(drift.mul_(density.n_beta).add_(density.gamma * u), slope)


class _Turns:
    """Which chains a call is for: all of them, or the next few in their order, step after step."""

    def __init__(self, chains: int) -> None:
        self._chains, self._next = chains, 0

    def __call__(self, count: int) -> slice:
        start, self._next = self._next, (self._next + count) % self._chains
        return slice(start, start + count)


def potential_gradient(
    density: LocalDensity,
    chains: int,
    batch_size: int | None,
    control_variate: bool,
    batching: Batching,
    generator: Generator,
) -> GradientFunction:
    """The gradient of U = n_beta L + (gamma/2)|u|^2 for a block of chains.

    All chains come in one call, or a few at a time in their order: what they share is drawn with the first of them.

    With the control variate the minibatch gradient g_B(u) enters as its change since the checkpoint,

        n_beta [ g_B(u) - g_B(0) ]  (+ n_beta g(0) unless centred)  + gamma u,

    whose noise vanishes at the checkpoint instead of drowning the posterior. All chains then share one
    minibatch, so that g_B(0) costs one model's gradient. Without it every chain draws its own.

    Args:
        density: the posterior.
        chains: number of chains.
        batch_size: samples per minibatch; None is the whole training set.
        control_variate: see above; without noise (full batch) it changes nothing.
        batching: stack the chains, or loop over them.
        generator: draws the minibatches.
    """
    train, device = density.task.train, density.task.device
    if batch_size is None or batch_size >= len(train):
        return exact_gradient(density, batching)
    loss, centred = BatchLoss(density), density.posterior.centred
    turn = _Turns(chains)

    if control_variate:
        indices, per_chain = reshuffled(len(train), batch_size, generator), chain_gradients(loss, batching)
        anchor_gradient = None if centred else full_gradient(density)

        current: list[tuple[Batch, Tensor]] = []

        def anchored(u: Tensor) -> Gradient:
            if turn(len(u)).start == 0:
                current.clear()
                batch = train.batch(next(indices), device)
                still = loss.gradient(density.origin, batch)
                current.append((batch, still if anchor_gradient is None else still.sub_(anchor_gradient)))
            batch, still = current[0]
            return _of_potential(density, u, per_chain(u, batch), still)

        return anchored

    own = [reshuffled(len(train), batch_size, generator) for _ in range(chains)]
    of_chains = _own_gradients(loss, batching)
    anchor_gradient = full_gradient(density) if centred else None

    def plain(u: Tensor) -> Gradient:
        slope = of_chains(u, [train.batch(next(indices), device) for indices in own[turn(len(u))]])
        return _of_potential(density, u, slope, anchor_gradient)

    return plain
