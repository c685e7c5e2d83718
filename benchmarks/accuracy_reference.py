"""The exact covariance of a local posterior, in two ways that share its Hessian and its loss, and no sampler of ours.

weighted     independent draws, in pairs u and -u, from the Gaussian of the posterior's quadratic form, weighted by the
             ratio of the two laws
HMC          Hamiltonian Monte Carlo with a Metropolis test, beside that of the Gaussian by the same random numbers

In both only what lies beyond first order is noisy, and nothing has a step size. The one whose own error is smaller is
the reference: weights become uneven where the loss is far from quadratic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from accuracy_problems import Place
from hmc import Potential, Quadratic, hmc
from torch import Tensor
from torch.func import vmap

from stagewise.derivatives import dense, hessian_product, mean_gradient
from stagewise.influence.covariance import covariance_replicates, mean_and_stderr
from stagewise.traces.columns import Array

PAIRS, PARTS, AT_ONCE = 8192, 16, 128  # of weighted draws
CHAINS, DRAWS = 16, 64


class Reference(NamedTuple):
    """Influence ``(train, query)`` and its standard error."""

    value: Array
    stderr: Array


class Gaussian(NamedTuple):
    """Of the quadratic form: curvatures of the mean loss, their directions in columns, standard deviation of each."""

    curvatures: Tensor
    directions: Tensor
    spread: Tensor


def references(place: Place) -> tuple[Reference, str]:
    """The better one, and in words how far the other is from it."""
    gaussian, slopes = quadratic(place), class_gradients(place)
    first, second = ((slope.double() @ gaussian.directions) * gaussian.spread for slope in slopes)
    exact = -place.weight * (first @ second.T).numpy()
    found = {"weighted draws": importance(place, gaussian, slopes), "HMC": hamiltonian(place, gaussian, slopes)}
    both = {name: Reference(exact + one.value, one.stderr) for name, one in found.items()}
    best, other = sorted(both, key=lambda name: float((both[name].stderr ** 2).mean()))
    size = np.sqrt((both[best].value ** 2).mean())
    own, its = (np.sqrt((both[name].stderr ** 2).mean()) / size for name in (best, other))
    variance = both[best].stderr ** 2 + both[other].stderr ** 2
    apart = np.sqrt(((both[best].value - both[other].value) ** 2 / variance).mean())
    return both[best], f"reference: {best}, error {own:.1%}; {other}, {its:.1%}, differ from it by {apart:.2f} errors"


def quadratic(place: Place) -> Gaussian:
    density = place.density
    matrix = dense(hessian_product(density, density.origin), density.origin).double()
    curvatures, directions = torch.linalg.eigh(matrix)
    return Gaussian(curvatures, directions, (density.n_beta * curvatures + density.gamma) ** -0.5)


def class_gradients(place: Place) -> tuple[Tensor, Tensor]:
    """Of the mean loss of every class ``(class, parameters)``, of both sets."""
    u = place.density.origin.clone().requires_grad_()
    found = []
    for losses, rows in zip(place.losses(u), (place.problem.train, place.problem.query), strict=True):
        means = rows.float() @ losses
        found.append(torch.stack([torch.autograd.grad(mean, u, retain_graph=True)[0] for mean in means]))
    return found[0], found[1]


def weighted(
    place: Place, gaussian: Gaussian, slopes: tuple[Tensor, Tensor], random: torch.Generator
) -> tuple[Tensor, ...]:
    """Losses at u and -u, logarithms of their weights, and first-order changes at u, of some draws."""
    density, (curvatures, directions, spread) = place.density, gaussian
    xi = torch.randn(AT_ONCE, len(spread), generator=random, dtype=torch.float64) * spread
    u = (xi @ directions.T).to(density.anchor)
    tilt = u.double() @ mean_gradient(density, density.origin, density.task.train).double()
    losses, logs = [], []
    with torch.no_grad():
        at_anchor = place.losses(density.origin)[0].double()
        for sign in (1, -1):
            train, query = vmap(place.losses)(sign * u)
            losses.append(place.means(train, query))
            change = (train.double() - at_anchor).mean(1) - sign * tilt
            logs.append(density.n_beta * ((xi**2 * curvatures).sum(1) / 2 - change))
    (train, query), (mirrored_train, mirrored_query) = losses
    linear = [u.double() @ slope.double().T for slope in slopes]
    return train, query, mirrored_train, mirrored_query, *logs, *linear


def remainder(*drawn: Tensor) -> Array:
    """Weighted covariance of losses less the plain one of their first order ``(train, query)``."""
    train, query, mirrored_train, mirrored_query, log, mirrored_log, t, s = drawn
    weights = torch.softmax(torch.cat([log, mirrored_log]), 0)[:, None]
    train, query = torch.cat([train, mirrored_train]), torch.cat([query, mirrored_query])
    train, query = (losses - (weights * losses).sum(0) for losses in (train, query))
    found: Array = ((weights * train).T @ query - t.T @ s / len(t)).numpy()
    return found


def importance(place: Place, gaussian: Gaussian, slopes: tuple[Tensor, Tensor]) -> Reference:
    """What lies beyond first order, by draws in parts, whose spread is the error."""
    random, parts = torch.Generator().manual_seed(1), []
    for _ in range(PARTS):
        drawn = [weighted(place, gaussian, slopes, random) for _ in range(PAIRS // PARTS // AT_ONCE)]
        parts.append(remainder(*(torch.cat(kind) for kind in zip(*drawn, strict=True))))
    return Reference(*mean_and_stderr(-place.weight * np.stack(parts)))


def hamiltonian(place: Place, gaussian: Gaussian, slopes: tuple[Tensor, Tensor]) -> Reference:
    """The same by chains; stretches of them are the replicates."""
    density, (_, directions, spread) = place.density, gaussian
    slow, fast = (float(end) ** -2 for end in (spread.max(), spread.min()))
    laws = Potential(density), Quadratic(((directions / spread**2) @ directions.T).to(density.anchor))
    start = density.origin.expand(CHAINS, -1)
    chains, shadows = hmc(laws, start, slow, fast, DRAWS, torch.Generator().manual_seed(0))
    seen = [place.classes(draw) for draw in chains.positions.unbind(1)]
    losses = (torch.stack(one, 1).numpy() for one in zip(*seen, strict=True))
    linear = ((shadows.positions.double() @ slope.double().T).numpy() for slope in slopes)
    beyond = covariance_replicates(*losses) - covariance_replicates(*linear)
    return Reference(*mean_and_stderr(-place.weight * beyond))
