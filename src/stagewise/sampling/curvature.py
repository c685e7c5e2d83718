"""The extreme curvatures of the training loss at a checkpoint, by Lanczos.

They decide everything a sampler must know before it starts: whether the posterior exists (is localised), the
largest stable step, and how many steps the slowest direction needs to forget where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from stagewise.evaluate import CURVATURE_SAMPLES, hessian_product, spread_rows
from stagewise.sampling.posterior import MAX_NEGATIVE_CURVATURE, LocalDensity

_DENSE_LIMIT = 32
_RESTARTS = 100


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
        slow = density.gamma * max(0.1, 1 + min(0.0, self.smallest) / density.damping)
        return slow, density.gamma + density.n_beta * max(0.0, self.largest)


def extreme_curvature(density: LocalDensity) -> Curvature:
    """Both ends of the whitened Hessian's spectrum; the lower to about one per cent of the damping.

    Raises:
        ValueError: the products are not finite, or Lanczos did not converge.
    """
    rows = spread_rows(CURVATURE_SAMPLES, len(density.task.train))
    product, size = hessian_product(density, density.origin, rows), density.vector.size

    def checked(v: Tensor) -> np.ndarray:
        image = product(v.to(density.anchor)).cpu().double().numpy()
        if not np.isfinite(image).all():
            raise ValueError(
                "the curvature of the training loss at this checkpoint is not finite: the loss is not twice "
                "differentiable there, or overflows. Look at the checkpoint's weights and losses"
            )
        return image

    if size <= _DENSE_LIMIT:
        dense = checked(torch.eye(size))
        values, vectors = np.linalg.eigh((dense + dense.T) / 2)
        return Curvature(float(values[0]), float(values[-1]), torch.from_numpy(vectors[:, 0]).to(density.anchor))
    # Lanczos works to a precision relative to each eigenvalue, which those of H near zero would never reach.
    # It is given H + shift, which takes zero to twice the damping, and the limit of localisation to it.
    shift = 2 * density.damping
    operator = LinearOperator(
        (size, size),
        matvec=lambda v: checked(torch.from_numpy(v.reshape(1, -1)))[0] + shift * v.reshape(-1),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(size)
    try:
        values, vectors = eigsh(operator, k=2, which="BE", v0=start, tol=1e-2, maxiter=_RESTARTS)
    except ArpackNoConvergence as error:
        raise ValueError(
            f"Lanczos did not find the extreme curvatures of the training loss in {_RESTARTS} restarts; "
            "use a shorter window (a larger gamma), or let fewer parameters move"
        ) from error
    softest = torch.from_numpy(vectors[:, values.argmin()]).to(density.anchor)
    return Curvature(float(values.min()) - shift, float(values.max()) - shift, softest)
