"""The extreme curvatures of the training loss at a checkpoint, by Lanczos.

They decide everything a sampler must know before it starts: whether the posterior exists (is localised), the
largest stable step, and how many steps the slowest direction needs to forget where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.func import grad, vjp, vmap

from stagewise.attention import plain_attention
from stagewise.sampling.posterior import LocalDensity
from stagewise.task import Batch

# Enough samples to see the ends of the spectrum; a larger training set is represented by this many of them.
CURVATURE_SAMPLES = 2048
_DENSE_LIMIT = 32
_RESTARTS = 100


@dataclass(frozen=True)
class Curvature:
    """Smallest and largest eigenvalue of the whitened Hessian P^(1/2) H P^(1/2) of the mean training loss."""

    smallest: float
    largest: float

    def localised(self, density: LocalDensity) -> bool:
        """Whether the localisation outweighs the most negative curvature, so that the posterior exists."""
        return self.smallest > -density.damping

    def precision_range(self, density: LocalDensity) -> tuple[float, float]:
        """Smallest and largest precision of the posterior's directions, for tuning a sampler.

        The smallest is kept above a tenth of gamma: beyond that, anharmonic terms confine the chain first.
        """
        slow = density.gamma * max(0.1, 1 + min(0.0, self.smallest) / density.damping)
        return slow, density.gamma + density.n_beta * max(0.0, self.largest)


def hessian_product(density: LocalDensity, samples: int = CURVATURE_SAMPLES) -> Callable[[Tensor], Tensor]:
    """The map v -> P^(1/2) H P^(1/2) v for the mean loss of ``samples`` training samples.

    Args:
        density: where; H is taken at the checkpoint.
        samples: how many training samples; at least as many as there are means all.

    Returns:
        A function of ``(parameters,)`` or ``(k, parameters)``.
    """
    batches = training_batches(density, samples)
    origin, gradient = torch.zeros_like(density.anchor), grad(density.mean_loss)

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for batch, share in batches:
            with plain_attention():
                # H is symmetric, so its product is also the reverse-mode derivative of the gradient: one
                # graph for all vectors, and cheaper than forward mode.
                pull = vjp(partial(gradient, batch=batch), origin)[1]
                total = total + share * (vmap(pull)(v) if v.ndim == 2 else pull(v))[0]
        return total

    return product


def training_batches(density: LocalDensity, samples: int) -> list[tuple[Batch, float]]:
    """``samples`` training samples in batches, each with its share of them.

    Evenly spaced, because training sets are often sorted, by class for instance.
    """
    train, device = density.task.train, density.task.device
    count = min(samples, len(train))
    rows = torch.arange(count) * len(train) // count
    pieces = torch.split(rows, density.task.forward_batch)
    return [(train.batch(piece, device), len(piece) / count) for piece in pieces]


def extreme_curvature(density: LocalDensity) -> Curvature:
    """Both ends of the whitened Hessian's spectrum; the lower to about one per cent of the damping.

    Raises:
        ValueError: the products are not finite, or Lanczos did not converge.
    """
    product, size = hessian_product(density), density.vector.size

    def checked(v: Tensor) -> np.ndarray:
        image = product(v.to(density.anchor)).double().cpu().numpy()
        if not np.isfinite(image).all():
            raise ValueError(
                "the curvature of the training loss at this checkpoint is not finite: the loss is not twice "
                "differentiable there, or overflows. Look at the checkpoint's weights and losses"
            )
        return image

    if size <= _DENSE_LIMIT:
        dense = checked(torch.eye(size))
        values = np.linalg.eigvalsh((dense + dense.T) / 2)
        return Curvature(float(values[0]), float(values[-1]))
    # Lanczos works to a precision relative to each eigenvalue, which those of H near zero would never reach.
    # It is given H + shift, which takes zero to twice the damping, and the limit of localisation to it.
    shift = 2 * density.damping
    operator = LinearOperator(
        (size, size),
        matvec=lambda v: checked(torch.from_numpy(v.reshape(-1))) + shift * v.reshape(-1),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(size)
    try:
        values = eigsh(operator, k=2, which="BE", v0=start, tol=1e-2, maxiter=_RESTARTS, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise ValueError(
            f"Lanczos did not find the extreme curvatures of the training loss in {_RESTARTS} restarts; "
            "use a shorter window (a larger gamma), or let fewer parameters move"
        ) from error
    return Curvature(float(values.min()) - shift, float(values.max()) - shift)
