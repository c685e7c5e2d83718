"""A short look before the chains: where the posterior reaches, and whether first order dominates there.

A few chains on the exact gradient of some training samples, about a tenth of the work of the real ones, or a few
independent draws. They are seeded by ``Chains.seed`` alone, so that all blocks of a checkpoint choose alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from stagewise.evaluate import Batching
from stagewise.sampling.base import Source
from stagewise.sampling.block import Block
from stagewise.sampling.curvature import Curvature
from stagewise.sampling.gradient import exact_gradient
from stagewise.sampling.posterior import LocalDensity
from stagewise.sampling.underdamped import Underdamped
from stagewise.sampling.watch import Watch

MAX_EVEN_SHARE = 0.1
"""Of the spread of the losses, what may be of second order before ``n_beta`` is raised."""

_GOOD_EVEN_SHARE = 0.05
PILOTS, _FEW_PILOTS = 16, 4
"""How many chains, or draws."""

_RELAXATIONS = 3
_ROUNDS = 6
_CLOSER = 4.0


def pilot(
    density: LocalDensity, reached: Callable[[LocalDensity], Tensor], batching: Batching, free: bool
) -> tuple[LocalDensity, Tensor]:
    """The posterior with n_beta changed until first order dominates, if it is ``free``, and places that it reaches.

    With a window n_beta is free: gamma follows it, and what is measured stays the same. Far from the checkpoint losses
    are of second order too; very close to it, of a model that computes in bfloat16 or after a small learning rate, all
    that they do is rounding. ``reached`` finds places ``(16, parameters)`` about the checkpoint.
    """
    positions, before = reached(density), 1.0
    for _ in range(_ROUNDS if free else 0):
        factor = _factor(density, positions, batching)
        if factor == 1 or (factor - 1) * (before - 1) < 0:  # between rounding and second order there is no room
            break
        density = replace(density, n_beta=factor * density.n_beta, gamma=factor * density.gamma)
        positions, before = reached(density), factor
    return density, positions


def by_chains(density: LocalDensity, curvature: Curvature, rows: Tensor, batching: Batching, noise: Source) -> Tensor:
    """Places that the posterior reaches, by chains on the training samples ``rows``: ``(chain, parameters)``."""
    slow, fast = curvature.precision_range(density)
    sampler, gradient = Underdamped.tuned(slow, fast), exact_gradient(density, batching, rows)
    count = pilots(density)
    chains = Block(density, sampler, gradient, noise, count, apart=density.task.pure.in_place)
    for _ in range(math.ceil(_RELAXATIONS * sampler.relaxation(slow))):
        chains.step()
    places = chains.places(torch.ones(count, dtype=torch.bool, device=density.anchor.device))
    return places if isinstance(places, Tensor) else torch.stack(list(places))


def pilots(density: LocalDensity) -> int:
    """How many chains there are: of a model that several processes hold as few as show a variance."""
    return _FEW_PILOTS if density.task.pure.in_place else PILOTS


def _factor(density: LocalDensity, positions: Tensor, batching: Batching) -> float:
    """How many times larger n_beta should be, a power of two: 1 where first order dominates at ``positions``.

    The variance of the losses' odd part shrinks like 1/n_beta, that of the even part like its square, at kinks like its
    power of 3/2. What rounding makes is even as much as odd, at whatever distance, until nothing moves.
    """
    share = _even_share(_spreads(density, positions, batching))
    if share <= MAX_EVEN_SHARE:
        return 1.0
    closer = _spreads(density, positions / _CLOSER, batching)
    if not any(map(sum, closer)) or _odds(_even_share(closer)) > _odds(share) / 2:
        return _CLOSER**-2
    return 2.0 ** math.ceil(math.log2(_odds(share) / _odds(_GOOD_EVEN_SHARE)))


def _odds(share: float) -> float:
    """Of the even part beside the odd one."""
    return share / max(1 - share, 1e-3)


def _even_share(spreads: list[tuple[float, float]]) -> float:
    """As :func:`stagewise.traces.diagnostics.even_share`."""
    return max((even / (even + odd) for even, odd in spreads if even + odd > 0), default=0.0)


def _spreads(density: LocalDensity, positions: Tensor, batching: Batching) -> list[tuple[float, float]]:
    """Variance of the even and the odd part of the losses of every data set, over places that are finite."""
    watch = Watch(density, batching, reflect=True)
    finite = watch.draw(positions).cpu()
    if finite.sum() < 2:
        return []
    spreads = []
    for seen in watch.traces().values():
        reflected = cast(Tensor, seen.loss_reflected)
        there, mirrored = (losses[finite] - seen.loss_anchor for losses in (seen.loss, reflected))
        even, odd = ((there + sign * mirrored).var(0).sum().item() for sign in (1, -1))
        spreads.append((even, odd))
    return spreads
