"""The extreme curvatures of the training loss at a checkpoint, by Lanczos.

They decide everything a sampler must know before it starts: whether the posterior exists (is localised), the
largest stable step, and how many steps the slowest direction needs to forget where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from stagewise.derivatives import Product, hessian_product
from stagewise.evaluate import represented
from stagewise.sampling.base import standard_normal
from stagewise.sampling.differenced import differenced_product
from stagewise.sampling.lanczos import ends
from stagewise.sampling.noise import noise_source
from stagewise.sampling.posterior import MAX_NEGATIVE_CURVATURE, LocalDensity

_DENSE_LIMIT = 32
_RESTARTS = 100
# Up to this many parameters ARPACK's twenty vectors in float64 are small, and its restarts are worth them.
_STORED_LIMIT = 2**20
_PRODUCTS = 300
_PRECISE = 1e-2


@dataclass(frozen=True)
class Curvature:
    """The ends of the spectrum of the whitened Hessian P^(1/2) H P^(1/2) of the mean training loss.

    Attributes:
        smallest: eigenvalue.
        largest: eigenvalue.
        softest: direction of the smallest eigenvalue ``(parameters,)``, of length 1.
    """

    smallest: float
    largest: float
    softest: Tensor

    def localised(self, density: LocalDensity) -> bool:
        """Whether the posterior exists, and with a window is near enough to what the window does.

        The localisation must outweigh the most negative curvature, and that of a window must do so by
        ``MAX_NEGATIVE_CURVATURE``.
        """
        most = MAX_NEGATIVE_CURVATURE if density.posterior.window else 1.0
        return self.smallest > -most * density.damping

    def precision_range(self, density: LocalDensity) -> tuple[float, float]:
        """Smallest and largest precision of the posterior's directions, for tuning a sampler.

        The smallest is kept above a tenth of gamma: beyond that, anharmonic terms confine the chain first.
        """
        slow = max(slowest(density), density.gamma * (1 + min(0.0, self.smallest) / density.damping))
        return slow, density.gamma + density.n_beta * max(0.0, self.largest)


def slowest(density: LocalDensity) -> float:
    """The least precision that a direction of a posterior is taken to have."""
    return 0.1 * density.gamma


def extreme_curvature(density: LocalDensity) -> Curvature:
    """Both ends of the whitened Hessian's spectrum; the lower to about one per cent of the damping.

    Raises:
        ValueError: the products are not finite, or Lanczos or differences did not converge.
    """
    in_place, size = density.task.pure.in_place, density.vector.count
    product = (
        differenced_product(density) if in_place else hessian_product(density, density.origin, represented(density))
    )

    def image(vectors: Tensor) -> Tensor:
        found = product(vectors.to(density.anchor))
        if density.task.ranks.total((~torch.isfinite(found)).sum()):
            raise ValueError(
                "the curvature of the training loss at this checkpoint is not finite: the loss is not twice "
                "differentiable there, or overflows. Look at the checkpoint's weights and losses"
            )
        return found

    if size <= _DENSE_LIMIT and not in_place:
        dense = image(torch.eye(size)).cpu().double()
        values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
        return Curvature(float(values[0]), float(values[-1]), vectors[:, 0].to(density.anchor))
    found = _stored(image, density) if size <= _STORED_LIMIT and not in_place else _recurring(image, density)
    if found is None:
        raise ValueError(
            "Lanczos did not find the extreme curvatures of the training loss; use a shorter window (a larger gamma), "
            "or let fewer parameters move"
        )
    return found


def _stored(image: Product, density: LocalDensity) -> Curvature | None:
    """By ARPACK, which keeps twenty vectors.

    It works to a precision relative to each eigenvalue, which those of H near zero would never reach. It is given
    H + shift, which takes zero to twice the damping, and the limit of localisation to it.
    """
    shift, size = 2 * density.damping, density.vector.size

    def shifted(v: NDArray[np.float64]) -> NDArray[np.float64]:
        own: NDArray[np.float64] = image(torch.from_numpy(v.reshape(1, -1)))[0].cpu().double().numpy()
        return own + shift * v.reshape(-1)

    operator = LinearOperator((size, size), matvec=shifted, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    try:
        values, vectors = eigsh(operator, k=2, which="BE", v0=start, tol=_PRECISE, maxiter=_RESTARTS)
    except ArpackNoConvergence:
        return None
    softest = torch.from_numpy(vectors[:, values.argmin()]).to(density.anchor)
    return Curvature(float(values.min()) - shift, float(values.max()) - shift, softest)


def _recurring(image: Product, density: LocalDensity) -> Curvature | None:
    """With a few vectors in memory, and every product twice."""
    start, ranks = None, density.task.ranks
    if density.task.pure.in_place:
        start = standard_normal(density.origin[None], noise_source(density, 0, 0, "lanczos", 1))
    found = ends(image, density.origin, _PRECISE, density.damping, _PRODUCTS, start, ranks)
    return Curvature(found.smallest, found.largest, found.softest) if found else None
