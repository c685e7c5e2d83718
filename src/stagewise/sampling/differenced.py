"""Products with the whitened Hessian of a model that several processes hold, by differences of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.converging import CONVERGED, converging
from stagewise.derivatives import Product, bend, mean_gradient
from stagewise.evaluate import represented
from stagewise.sampling.posterior import LocalDensity


def differenced_product(density: LocalDensity) -> Product:
    """Vectors ``(k, parameters)`` to H v, over steps at which those along the gradient converge.

    Raises:
        ValueError: they do so at no length, as where something is rounded.
    """
    ranks, rows = density.task.ranks, represented(density)
    slope = mean_gradient(density, density.origin, density.task.train, rows)
    least = density.damping * float(ranks.norm(slope))  # what is small beside the damping decides nothing

    def changed(near: Tensor, far: Tensor) -> float:
        size = max(float(ranks.norm(near)), float(ranks.norm(far)), least)
        return float(ranks.norm(near - far)) / size if size else 0.0

    length, differs = converging(lambda length: bend(density, density.origin, slope, rows, length), changed)
    if not differs <= CONVERGED:
        raise ValueError(
            f"curvature cannot be told from differences of gradients: over a step three times as long it is "
            f"{differs:.0%} another one at best. Compute in float32 or float64 throughout"
        )
    return lambda vectors: torch.stack([bend(density, density.origin, v, rows, length) for v in vectors])
