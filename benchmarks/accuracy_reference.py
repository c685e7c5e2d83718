"""The covariance of losses under a local posterior, in two ways, neither by a sampler of the package.

weighted     independent draws, in pairs u and -u, from the Gaussian of the posterior's quadratic form, weighted by the
             ratio of the two laws
HMC          Hamiltonian Monte Carlo with a Metropolis test

Neither has an error of step size. Noise is of what lies beyond first order alone: under any law with potential U the
covariance of g_i . u and h_j . grad U is g_i . h_j. With h_j = Q^-1 g_j, Q being the precision of the quadratic form,
that is the covariance to first order, and h_j . grad U is nearly g_j . u:

    Cov(l_i, l_j) = g_i . Q^-1 g_j  +  [ Cov(l_i, l_j) - Cov(g_i . u, h_j . grad U) ].

The one whose own error is smaller is the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from accuracy_problems import Place
from hmc import Potential, hmc
from torch import Tensor

from stagewise.derivatives import dense, hessian_product
from stagewise.influence.covariance import covariance_replicates, mean_and_stderr
from stagewise.traces.columns import Array

PAIRS, PARTS, AT_ONCE = 16384, 16, 128  # of weighted draws
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


class Tangent(NamedTuple):
    """At the checkpoint: slopes g of the classes' losses, of the training set and of the queries, and Q^-1 of these."""

    train: Tensor
    query: Tensor
    response: Tensor


def references(place: Place) -> tuple[Reference, str]:
    """The better one, and in words how far the other is from it."""
    gaussian = quadratic(place)
    train, query = class_gradients(place)
    tangent = Tangent(train, query, (query @ gaussian.directions * gaussian.spread**2) @ gaussian.directions.T)
    first = -place.weight * (train @ tangent.response.T).numpy()
    found = {"weighted draws": weighted(place, gaussian, tangent), "HMC": hamiltonian(place, gaussian, tangent)}
    both = {name: Reference(first + one.value, one.stderr) for name, one in found.items()}
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
    """Of the mean loss of every class ``(class, parameters)``, of both sets, float64."""
    u = place.density.origin.clone().requires_grad_()
    found = []
    for losses, rows in zip(place.losses(u), (place.problem.train, place.problem.query), strict=True):
        means = rows.float() @ losses
        found.append(torch.stack([torch.autograd.grad(mean, u, retain_graph=True)[0] for mean in means]).double())
    return found[0], found[1]


def seen(place: Place, potential: Potential, tangent: Tangent, u: Tensor) -> tuple[Tensor, ...]:
    """At ``u (place, parameters)``: losses of classes, g . u of the training set's, h . grad U, and U."""
    value, slope = potential(u)
    return *place.classes(u), u.double() @ tangent.train.T, slope.double() @ tangent.response.T, value


def weighted(place: Place, gaussian: Gaussian, tangent: Tangent) -> Reference:
    """What lies beyond first order, by draws in parts, whose spread is the error."""
    random, potential, parts = torch.Generator().manual_seed(1), Potential(place.density), []
    for _ in range(PARTS):
        drawn = []
        for _ in range(PAIRS // PARTS // AT_ONCE):
            xi = torch.randn(AT_ONCE, len(gaussian.spread), generator=random, dtype=torch.float64)
            u = (xi * gaussian.spread @ gaussian.directions.T).to(place.density.anchor)
            for sign in (1, -1):
                *traces, value = seen(place, potential, tangent, sign * u)
                drawn.append([*traces, xi.square().sum(1) / 2 - value])
        train, query, linear, force, logs = (torch.cat(kind) for kind in zip(*drawn, strict=True))
        weights = torch.softmax(logs, 0)
        parts.append((covariance(weights, train, query) - covariance(weights, linear, force)).numpy())
    return Reference(*mean_and_stderr(-place.weight * np.stack(parts)))


def covariance(weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of columns of ``a (draw, column)`` and ``b``, by weights that sum to 1."""
    a, b = (side - weights @ side for side in (a, b))
    return (weights[:, None] * a).T @ b


def hamiltonian(place: Place, gaussian: Gaussian, tangent: Tangent) -> Reference:
    """The same by chains; stretches of them are the replicates."""
    slow, fast = (float(end) ** -2 for end in (gaussian.spread.max(), gaussian.spread.min()))
    chains = hmc(place.density, slow, fast, CHAINS, DRAWS, torch.Generator().manual_seed(0))
    potential = Potential(place.density)
    drawn = [seen(place, potential, tangent, u) for u in chains.positions.unbind(1)]
    train, query, linear, force, _ = (torch.stack(kind, 1).numpy() for kind in zip(*drawn, strict=True))
    beyond = covariance_replicates(train, query) - covariance_replicates(linear, force)
    return Reference(*mean_and_stderr(-place.weight * beyond))
