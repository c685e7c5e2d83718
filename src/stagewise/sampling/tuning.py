"""What is chosen at a checkpoint before chains start: n_beta, step, burn-in and thinning, the size of minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from stagewise.evaluate import Batching, represented, spread_rows
from stagewise.sampling.base import Langevin, Sampler
from stagewise.sampling.curvature import Curvature, extreme_curvature, slowest
from stagewise.sampling.gradient import potential_gradient
from stagewise.sampling.heat import epoch_correlation, gradient_noise, quiet
from stagewise.sampling.noise import generator, noise_source
from stagewise.sampling.pilot import PILOTS, by_chains, pilot, pilots
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.sampling.rmsprop_sgld import RMSpropSGLD
from stagewise.sampling.sgld import SGLD
from stagewise.sampling.underdamped import Underdamped
from stagewise.sampling.window_gaussian import WindowGaussian
from stagewise.stacking import decided

if TYPE_CHECKING:
    from stagewise.sampling.chains import Chains

SamplerName = Literal["underdamped", "sgld", "rmsprop_sgld", "window"]
LANGEVIN: dict[SamplerName, type[Langevin]] = {
    "underdamped": Underdamped,
    "sgld": SGLD,
    "rmsprop_sgld": RMSpropSGLD,
}

# The pilot goes by the exact gradient of as many samples as this many minibatches hold.
_PILOT_BATCHES = 8
# Where gradients are compared that are too large for many of them to be kept.
_FEW_PLACES = 2


@dataclass(frozen=True)
class Tuning:
    """A sampler with its burn-in and thinning for one checkpoint, and what they follow from.

    Attributes:
        density: the posterior, with ``n_beta`` as it was chosen.
        n_beta_raised: how many times the usual that is, below 1 where it was lowered; None where it was given.
        sampler: with its step size.
        burn_in: steps before the first draw.
        thinning: steps per draw.
        batch_size: samples per gradient; None is the training set.
        batching: stack the chains or loop over them.
        heat: share of the variance that comes from minibatches, at most; None where it was not measured.
        stable_step: the step size that the curvature and the minibatches ask for; None where it was not looked at.
        relaxation: steps in which the slowest direction forgets where it was; None of independent draws.
        slow: precision of the slowest direction, or less; None of independent draws, which cannot be lost on the way.
        curvature: the extremes of the whitened Hessian; None where nothing depends on them.
        localised: whether the posterior exists, and is not far from what the window does; None where that was not
            looked at.
        refused: why nothing can be drawn, of independent draws; empty where it can.
    """

    density: LocalDensity
    n_beta_raised: float | None
    sampler: Sampler
    burn_in: int
    thinning: int
    batch_size: int | None
    batching: Batching
    heat: float | None
    stable_step: float | None
    relaxation: float | None
    slow: float | None
    curvature: Curvature | None
    localised: bool | None
    refused: str = ""


def tune(density: LocalDensity, sampling: Chains) -> Tuning:
    """Choose n_beta, step size, burn-in and thinning at a checkpoint, unless they are given.

    The step follows from the curvature, and from the noise of minibatches where there are any; n_beta from what the
    chains of a pilot see. Where nothing is to be chosen neither is looked at.

    Raises:
        ValueError: this posterior has no such sampler, see :func:`check_sampler`.
    """
    check_sampler(density.posterior, sampling)
    if sampling.sampler == "window":
        return _independent(density, sampling)
    if _all_given(density, sampling):
        return _by_hand(density, sampling)
    curvature, n = extreme_curvature(density), len(density.task.train)
    localised, size = curvature.localised(density), _minibatch(sampling, n)
    batching = decided(density, sampling.batching, sampling.chains, size)
    usual = density.n_beta
    free = density.posterior.n_beta is None and density.posterior.window is not None
    sampler, noise, correlation = _sampler(density, curvature, sampling), 0.0, epoch_correlation(n, size or n)
    if (free or size) and (localised or not density.posterior.require_localised):
        rows = spread_rows(_PILOT_BATCHES * size, n) if size else represented(density)
        random = noise_source(density, sampling.seed, 0, "pilot", pilots(density))
        reached = partial(by_chains, curvature=curvature, rows=rows, batching=batching, noise=random)
        density, positions = pilot(density, reached, batching, free)
        sampler = _sampler(density, curvature, sampling)
        if size:
            noise = _noise(density, sampling, batching, size, positions)
    slow, fast = curvature.precision_range(density)
    quieter = quiet(sampler, noise, fast, correlation)
    if size and sampling.step_size is None and _costs_more(sampling, size, n, sampler, quieter):
        size, noise, quieter = None, 0.0, sampler
    stable = quieter.step_size
    sampler = quieter if sampling.step_size is None else replace(cast(Any, quieter), step_size=sampling.step_size)
    relaxation = sampler.relaxation(slow)
    return Tuning(
        density,
        density.n_beta / usual if free else None,
        sampler,
        burn_in=math.ceil(5 * relaxation) if sampling.burn_in is None else sampling.burn_in,
        thinning=sampling.thinning or max(1, math.ceil(relaxation / 2)),
        batch_size=size,
        batching=batching,
        heat=sampler.heating(noise, fast, correlation),
        stable_step=stable,
        relaxation=relaxation,
        slow=slow,
        curvature=curvature,
        localised=localised,
    )


def check_sampler(posterior: LocalPosterior, sampling: Chains) -> None:
    """Refuse a sampler that does not know the posterior.

    Raises:
        ValueError: the window's own Gaussian is asked of a posterior without a window, or of one that is not centred.
    """
    if sampling.sampler != "window":
        return
    if posterior.window is None:
        raise ValueError(
            f"sampler='window' draws by the updates of a window, got gamma={posterior.gamma}; use "
            "LocalPosterior(window=...), or another sampler"
        )
    if not posterior.centred:
        raise ValueError(
            "sampler='window' draws about the checkpoint, got centred=False; leave that out, or use another sampler"
        )


def _independent(density: LocalDensity, sampling: Chains) -> Tuning:
    """No chain has to forget where it was, and no posterior to exist: all that is chosen is n_beta."""
    sampler, curvature, usual = WindowGaussian.of(density), extreme_curvature(density), density.n_beta
    refused, free = sampler.refused(density.posterior.window, curvature), density.posterior.n_beta is None
    batching = decided(density, sampling.batching, sampling.chains)
    if free and not refused:
        random = generator(sampling.seed, 0, "pilot", density.anchor.device)
        places = sampler.draw(PILOTS, density.anchor, random)
        density, _ = pilot(density, lambda colder: places * (usual / colder.n_beta) ** 0.5, batching, free)
    return Tuning(
        density,
        density.n_beta / usual if free else None,
        replace(sampler, n_beta=density.n_beta),
        burn_in=0,
        thinning=1,
        batch_size=None,
        batching=batching,
        heat=None,
        stable_step=None,
        relaxation=None,
        slow=None,
        curvature=curvature,
        localised=None,
        refused=refused,
    )


def _minibatch(sampling: Chains, n: int) -> int | None:
    return sampling.batch_size if sampling.batch_size and sampling.batch_size < n else None


def _all_given(density: LocalDensity, sampling: Chains) -> bool:
    """Whether the curvature would decide nothing."""
    posterior = density.posterior
    settings = (sampling.step_size, sampling.burn_in, sampling.thinning, posterior.n_beta)
    return None not in settings and not posterior.require_localised


def _by_hand(density: LocalDensity, sampling: Chains) -> Tuning:
    """Everything as it was given; by the localisation alone where even that leaves a choice."""
    size, slow = _minibatch(sampling, len(density.task.train)), slowest(density)
    sampler = LANGEVIN[sampling.sampler].tuned(density.gamma, density.gamma, **sampling.options)
    sampler = replace(cast(Any, sampler), step_size=sampling.step_size)
    return Tuning(
        density,
        None,
        sampler,
        burn_in=cast(int, sampling.burn_in),
        thinning=cast(int, sampling.thinning),
        batch_size=size,
        batching=decided(density, sampling.batching, sampling.chains, size),
        heat=None,
        stable_step=None,
        relaxation=sampler.relaxation(density.gamma),
        slow=slow,
        curvature=None,
        localised=None,
    )


def _sampler(density: LocalDensity, curvature: Curvature, sampling: Chains) -> Langevin:
    """The sampler as the curvature asks for it."""
    return LANGEVIN[sampling.sampler].tuned(*curvature.precision_range(density), **sampling.options)


def _noise(density: LocalDensity, sampling: Chains, batching: Batching, size: int, positions: Tensor) -> float:
    """Largest variance of minibatch gradients, over directions, where the chains will be."""
    if density.task.pure.in_place:
        positions = positions[:_FEW_PLACES]
    random = generator(sampling.seed, 0, "pilot batch", density.anchor.device)
    gradient = potential_gradient(density, len(positions), size, sampling.control_variate, batching, random)
    return gradient_noise(gradient, positions, len(density.task.train), size, density.task.ranks)


def _costs_more(sampling: Chains, size: int, n: int, sampler: Langevin, quieter: Langevin) -> bool:
    """Whether minibatches, with the shorter steps they need, cost more than the whole training set."""
    per_step = size * (1 + sampling.control_variate / sampling.chains)
    return per_step * sampler.step_size > n * quieter.step_size
