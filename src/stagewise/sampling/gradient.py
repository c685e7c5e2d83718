"""The gradient that drives the chains: minibatches, the control variate, and chains evaluated together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Generator, Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from stagewise.data import Batch
from stagewise.derivatives import mean_gradient
from stagewise.differentiate import differentiable, gradient
from stagewise.evaluate import Batching, over_rows, sample_weights
from stagewise.sampling.base import Gradient, GradientFunction
from stagewise.sampling.posterior import LocalDensity
from stagewise.slopes import slope_at


def full_gradient(density: LocalDensity) -> Tensor:
    """Gradient of the mean training loss at the checkpoint in whitened coordinates ``(parameters,)``."""
    return mean_gradient(density, density.origin, density.task.train)


_PIECE = 2**20  # numbers of a chain at a time, where what is computed of them is needed for a moment

Pieces = Sequence[tuple[float, Batch]]
"""A batch in pieces that fit in memory, each with its share of the samples."""


def pieces_of(density: LocalDensity, rows: Tensor) -> Pieces:
    """The training samples ``rows``, as many at a time as the task allows; those that are this process's."""
    task = density.task
    parts = task.ranks.parts(rows, task.forward_batch)
    shares = [count / len(rows) for _, count in parts]
    if task.ranks.divided == 1:
        shares[-1] = 1 - sum(shares[:-1])
    batches = (task.train.batch(part[: max(count, 1)], task.device) for part, count in parts)
    return list(zip(shares, batches, strict=True))


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
        return self.mean_gradient(u, [(1.0, batch)])

    def mean_gradient(self, u: Tensor, pieces: Pieces) -> Tensor:
        """The same of a batch in pieces."""
        values = [partial(self._share, share, batch) for share, batch in pieces]
        return slope_at(self._density, u, values)

    def _share(self, share: float, batch: Batch, params: Mapping[str, Tensor]) -> Tensor:
        value = self._of(params, batch)
        return value if share == 1 else share * value

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


def piecewise_gradients(loss: BatchLoss, batching: Batching) -> Callable[[Tensor, Pieces], Tensor]:
    """The same on a batch in pieces."""
    whole = chain_gradients(loss, batching)

    def apply(u: Tensor, pieces: Pieces) -> Tensor:
        if batching == "loop":
            return _rows([loss.mean_gradient(row, pieces) for row in u])
        if len(pieces) == 1:
            return whole(u, pieces[0][1])
        total = torch.zeros_like(u)
        for share, batch in pieces:
            total += share * whole(u, batch)
        return total

    return apply


def _rows(rows: list[Tensor]) -> Tensor:
    """As one tensor; a single one is not copied."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _own_gradients(density: LocalDensity, batching: Batching) -> Callable[[Tensor, list[Tensor]], Tensor]:
    """The same, every chain on samples of its own; stacked where the batches are tensors of equal shapes."""
    loss, task = BatchLoss(density), density.task

    def apply(u: Tensor, rows: list[Tensor]) -> Tensor:
        def one_by_one() -> Tensor:
            pairs = zip(u, rows, strict=True)
            return _rows([loss.mean_gradient(row, pieces_of(density, own)) for row, own in pairs])

        if batching == "loop":
            return one_by_one()
        stacked = task.train.stacked(torch.stack(rows), task.device)
        if stacked is None:
            stacked = _stacked([task.train.batch(own, task.device) for own in rows])
        if stacked is None:
            return one_by_one()
        with differentiable(u) as leaf:
            return gradient(vmap(loss)(leaf, stacked).sum(), leaf)

    return apply


def _stacked(batches: list[Batch]) -> Batch | None:
    """Batches as one, where all they hold are tensors of equal shapes."""
    flat = [tree_flatten(batch)[0] for batch in batches]
    same = all(
        isinstance(leaf, Tensor) and leaf.shape == first.shape
        for leaves in flat
        for leaf, first in zip(leaves, flat[0], strict=False)
    )
    return tree_map(lambda *leaves: torch.stack(leaves), *batches) if same else None


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
    slopes, pieces = piecewise_gradients(BatchLoss(density), batching), pieces_of(density, rows)
    anchor_gradient = slopes(density.origin[None], pieces) if density.posterior.centred else None

    def exact(u: Tensor) -> Gradient:
        return of_potential(density, u, slopes(u, pieces), anchor_gradient)

    return exact


def of_potential(density: LocalDensity, u: Tensor, slope: Tensor, still: Tensor | None) -> Gradient:
    """n_beta (slope - still) + gamma u, in few vectors; ``still`` is what does not count of the slope."""
    drift = slope * density.n_beta if still is None else (slope - still).mul_(density.n_beta)
    for part, there in zip(torch.split(drift, _PIECE, 1), torch.split(u, _PIECE, 1), strict=True):
        part.add_(density.gamma * there)
    return Gradient(drift, slope)


class Turns:
    """Which chains a call is for: all of them, or the next few in their order, step after step."""

    def __init__(self, chains: int) -> None:
        self._chains, self._next = chains, 0

    def __call__(self, count: int) -> slice:
        """Those of a call for so many."""
        start, self._next = self._next, (self._next + count) % self._chains
        return slice(start, start + count)


def potential_gradient(
    density: LocalDensity,
    chains: int,
    batch_size: int | None,
    control_variate: bool,
    batching: Batching,
    generator: Generator,
    taken: int = 0,
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
        taken: steps of all chains that were taken before; theirs are passed over.
    """
    train = density.task.train
    if batch_size is None or batch_size >= len(train):
        return exact_gradient(density, batching)
    loss, centred = BatchLoss(density), density.posterior.centred
    turn = Turns(chains)

    if control_variate:
        indices, slopes = reshuffled(len(train), batch_size, generator), piecewise_gradients(loss, batching)
        anchor_gradient = None if centred else full_gradient(density)
        for _ in range(taken):
            next(indices)

        current: list[tuple[Pieces, Tensor]] = []

        def anchored(u: Tensor) -> Gradient:
            if turn(len(u)).start == 0:
                current.clear()
                pieces = pieces_of(density, next(indices))
                still = loss.mean_gradient(density.origin, pieces)
                current.append((pieces, still if anchor_gradient is None else still.sub_(anchor_gradient)))
            pieces, still = current[0]
            return of_potential(density, u, slopes(u, pieces), still)

        return anchored

    own = [reshuffled(len(train), batch_size, generator) for _ in range(chains)]
    for _ in range(taken):
        for indices in own:
            next(indices)
    of_chains = _own_gradients(density, batching)
    anchor_gradient = full_gradient(density) if centred else None

    def plain(u: Tensor) -> Gradient:
        slope = of_chains(u, [next(indices) for indices in own[turn(len(u))]])
        return of_potential(density, u, slope, anchor_gradient)

    return plain
