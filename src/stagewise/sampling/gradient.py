"""The gradient that drives the chains: minibatches, the control variate, and chains evaluated together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from stagewise.attention import slow_path
from stagewise.memory import out_of_memory
from stagewise.sampling.base import Gradient, GradientFunction
from stagewise.sampling.curvature import training_batches
from stagewise.sampling.posterior import LocalDensity
from stagewise.task import Batch

Batching = Literal["stacked", "loop"]


def over_chains(function: Callable[..., Tensor], batching: Batching) -> Callable[..., Tensor]:
    """Apply ``function(u, batch)`` to every chain.

    Args:
        function: of one displacement ``(parameters,)`` and one batch.
        batching: ``"stacked"`` evaluates all chains at once (``torch.func.vmap``), ``"loop"`` one by one.

    Returns:
        A function of ``u (chain, parameters)``, a batch, and whether the batch has a chain axis of its own.
    """

    def apply(u: Tensor, batch: Batch, own_batch: bool = False) -> Tensor:
        if batching == "stacked":
            return vmap(function, in_dims=(0, 0 if own_batch else None))(u, batch)
        rows = [tree_map(lambda leaf, i=i: leaf[i], batch) if own_batch else batch for i in range(len(u))]
        return torch.stack([function(one, row) for one, row in zip(u, rows, strict=True)])

    return apply


def chain_gradients(loss: Callable[..., Tensor], batching: Batching) -> Callable[..., Tensor]:
    """The gradient of ``loss(u, batch)``, a number, of every chain; called like a function of ``over_chains``.

    Stacked chains share one backward pass: no chain's loss depends on another's position, so that the gradient of their
    sum is the gradient of each. One layer of batching is less work than the batched gradient of a single chain.
    """
    if batching == "loop":
        return over_chains(grad(loss), batching)
    losses = over_chains(loss, batching)

    def apply(u: Tensor, batch: Batch, own_batch: bool = False) -> Tensor:
        with slow_path(), torch.inference_mode(False), torch.enable_grad():
            leaf = u.detach().requires_grad_()
            total = losses(leaf, batch, own_batch).sum()
            if not total.requires_grad:  # a loss that does not depend on the parameters
                return torch.zeros_like(u)
            return torch.autograd.grad(total, leaf)[0]

    return apply


def reshuffled(n: int, size: int, generator: Generator) -> Iterator[Tensor]:
    """Endless minibatches of sample indices without replacement, freshly permuted each epoch.

    Sampling without replacement lets the minibatch noise cancel over an epoch, which heats the slow
    directions far less than independent batches do.
    """
    while True:
        order = torch.randperm(n, generator=generator)
        yield from (order[i : i + size] for i in range(0, n - size + 1, size))


def full_gradient(density: LocalDensity) -> Tensor:
    """Gradient of the mean training loss at the checkpoint in whitened coordinates ``(parameters,)``."""
    origin = torch.zeros_like(density.anchor)
    slope = grad(density.mean_loss)
    batches = training_batches(density, len(density.task.train))
    return sum((share * slope(origin, batch) for batch, share in batches), torch.zeros_like(origin))


def potential_gradient(
    density: LocalDensity,
    chains: int,
    batch_size: int | None,
    control_variate: bool,
    batching: Batching,
    generator: Generator,
) -> GradientFunction:
    """The gradient of U = n_beta L + (gamma/2)|u|^2 for a block of chains.

    With the control variate the minibatch gradient g_B(u) enters as its change since the checkpoint,

        n_beta [ g_B(u) - g_B(0) ]  (+ n_beta g(0) unless centred)  + gamma u,

    whose noise vanishes at the checkpoint instead of drowning the posterior. All chains then share one
    minibatch, so that g_B(0) costs one model's gradient. Without it every chain draws its own.

    Args:
        density: the posterior.
        chains: number of chains.
        batch_size: samples per minibatch; None is the whole training set.
        control_variate: see above; without noise (full batch) it changes nothing.
        batching: see ``over_chains``.
        generator: draws the minibatches.
    """
    train, device = density.task.train, density.task.device
    n_beta, gamma, centred = density.n_beta, density.gamma, density.posterior.centred
    anchor_gradient = full_gradient(density)
    origin = torch.zeros_like(density.anchor)
    per_chain = chain_gradients(density.mean_loss, batching)

    if batch_size is None or batch_size >= len(train):
        batches = training_batches(density, len(train))

        def exact(u: Tensor) -> Gradient:
            loss = sum((share * per_chain(u, batch) for batch, share in batches), torch.zeros_like(u))
            drift = loss - anchor_gradient if centred else loss
            return Gradient(n_beta * drift + gamma * u, loss)

        return exact

    if control_variate:
        indices = reshuffled(len(train), batch_size, generator)

        def anchored(u: Tensor) -> Gradient:
            batch = train.batch(next(indices), device)
            loss = per_chain(u, batch)
            drift = loss - grad(density.mean_loss)(origin, batch)
            if not centred:
                drift = drift + anchor_gradient
            return Gradient(n_beta * drift + gamma * u, loss)

        return anchored

    own = [reshuffled(len(train), batch_size, generator) for _ in range(chains)]

    def plain(u: Tensor) -> Gradient:
        index = torch.cat([next(indices) for indices in own])
        flat = train.batch(index, device)
        batch = tree_map(lambda leaf: leaf.reshape(chains, batch_size, *leaf.shape[1:]), flat)
        loss = per_chain(u, batch, True)
        drift = loss - anchor_gradient if centred else loss
        return Gradient(n_beta * drift + gamma * u, loss)

    return plain


def choose_batching(density: LocalDensity, chains: int, batch_size: int | None) -> Batching:
    """Time three gradients of a block both ways and take the faster: the loop if the model cannot be stacked.

    The choice decides the last bits of every draw, so callers must record it with the run.
    """
    seconds: dict[Batching, float] = {}
    u = torch.zeros(chains, density.vector.size).to(density.anchor)
    methods: tuple[Batching, ...] = ("stacked", "loop")
    for batching in methods:
        gradient = potential_gradient(density, chains, batch_size, True, batching, Generator().manual_seed(0))
        try:
            gradient(u)
        except RuntimeError as error:
            if batching == "loop" or out_of_memory(error):
                raise
            continue  # an operation without a batching rule
        start = time.perf_counter()
        for _ in range(3):
            _wait(gradient(u))
        seconds[batching] = time.perf_counter() - start
    return min(seconds, key=lambda batching: seconds[batching])


def _wait(result: Any) -> None:
    """Make asynchronous devices finish."""
    result.potential.flatten()[0].item()
