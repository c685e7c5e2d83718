"""Damped influence functions:  -(1/n) grad l_j^T (H + damping P^-1)^-1 grad l_i,  damping = gamma / n_beta.

With ``window=W`` the damping is 1 / (learning_rate * W) in the optimiser's metric, and this is the first-order
effect of re-weighting sample i during W steps. One linear solve per query, then one forward-mode pass over the
training data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
import xarray as xr
from scipy.linalg import eigh
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from stagewise.attention import plain_attention
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.gradients import first_order
from stagewise.sampling.curvature import CURVATURE_SAMPLES, hessian_product, training_batches
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.task import Batch, Task

CurvatureKind = Literal["gauss_newton", "hessian", "exact"]
_LARGEST_EXACT = 6000
_EXACT_CHUNK = 128


def damped_influence(
    task: Task,
    trajectory: Trajectory,
    posterior: LocalPosterior,
    *,
    curvature: CurvatureKind = "gauss_newton",
    steps: Sequence[int] | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
) -> xr.Dataset:
    """Damped influence function at every checkpoint.

    Args:
        task: the task; its group labels are used where it has them.
        trajectory: the run's checkpoints.
        posterior: metric and damping.
        curvature: ``"gauss_newton"``: matrix-free, positive definite everywhere, any model whose loss calls it
            once; ``"hessian"``: matrix-free, only where the posterior is localised; ``"exact"``: the dense
            Hessian of all samples, up to 6000 parameters. It raises eigenvalues below minus
            half the damping to that; at a checkpoint that is not localised the answer then exists, but is not to
            be trusted. The matrix-free ones take at most 2048 samples, evenly spaced in the training set.
        steps: which checkpoints, default all.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: of conjugate gradients, per checkpoint.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight. Negative is helpful.

    Raises:
        ValueError: negative curvature (``"hessian"``), too many parameters (``"exact"``), no convergence, or a
            loss that Gauss-Newton curvature is not defined for.
    """
    previous: list[Tensor] = []

    def solve(density: LocalDensity, gradients: Tensor) -> Tensor:
        if curvature == "exact":
            return exact_solve(density, gradients)
        product = (gauss_newton_product if curvature == "gauss_newton" else hessian_product)(density)
        start = previous[-1] if previous else torch.zeros_like(gradients)
        solution = conjugate_gradients(
            lambda v: product(v) + density.damping * v, gradients, start, tolerance, max_iterations
        )
        previous[:] = [solution]
        return solution

    return first_order(task, trajectory, posterior, f"damped influence ({curvature})", solve, steps)


def gauss_newton_product(density: LocalDensity, samples: int = CURVATURE_SAMPLES) -> Callable[[Tensor], Tensor]:
    """The map v -> P^(1/2) J^T B J P^(1/2) v, B the Hessian of the loss in the model's outputs.

    Args:
        density: where.
        samples: how many training samples, evenly spaced.

    Returns:
        A function of ``(k, parameters)``.
    """
    batches = training_batches(density, samples)

    def product(vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        for batch, share in batches:
            with plain_attention():
                total = total + share * _batch_product(density, batch, vectors)
        return total

    return product


def _batch_product(density: LocalDensity, batch: Batch, vectors: Tensor) -> Tensor:
    """The Gauss-Newton product of one batch: one graph of the model for all vectors."""
    rebuild: Rebuild

    def outputs(u: Tensor) -> list[Tensor]:
        nonlocal rebuild
        moved = density.vector.unflatten(density.anchor + density.scale * u)
        tensors, rebuild = _taken_apart(density.task.outputs(density.state | moved, batch))
        return tensors

    def loss(tensors: list[Tensor]) -> Tensor:
        return density.task.losses_from_outputs(rebuild(tensors), batch).mean()

    at, pull = cast("tuple[list[Tensor], Callable[..., Any]]", vjp(outputs, torch.zeros_like(density.anchor)))
    # The pullback J^T is linear, so its own pullback is J: reverse mode is all it takes.
    push = vjp(lambda y: pull(y)[0], [torch.zeros_like(tensor) for tensor in at])[1]
    bend = vjp(grad(loss), at)[1]

    def product(v: Tensor) -> Tensor:
        curved: Tensor = pull(*bend(*push(v)))[0]
        return curved

    return vmap(product)(vectors)


Rebuild = Callable[[list[Tensor]], Any]


def _taken_apart(outputs: Any) -> tuple[list[Tensor], Rebuild]:
    """The floating-point tensors in a model's outputs, and how to put others in their place.

    Whatever else is there (None, caches, numbers) stays as it is.
    """
    leaves, structure = tree_flatten(outputs)
    if leaves and leaves[0] is outputs and is_dataclass(outputs) and not isinstance(outputs, type):
        tensors, inner = _taken_apart({f.name: getattr(outputs, f.name) for f in fields(outputs)})
        return tensors, lambda new: replace(outputs, **inner(new))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not places:
        raise ValueError(
            f"the model returned {type(outputs).__name__}, in which no tensors were found; Gauss-Newton curvature "
            "needs a tensor, or a tuple, list, dict or dataclass of tensors. Use curvature='hessian'"
        )

    def rebuild(new: list[Tensor]) -> Any:
        at = dict(zip(places, new, strict=True))
        return tree_unflatten([at.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return [leaves[i] for i in places], rebuild


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    targets: Tensor,
    start: Tensor,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """Solve A x = b for every row of ``targets (k, parameters)`` at once; A positive definite.

    Raises:
        ValueError: a direction of negative curvature, or no convergence, with the residual reached.
    """
    x = start
    residual = targets - product(x)
    direction, squared = residual, residual.square().sum(1)
    size = targets.norm(dim=1)
    for iteration in range(max_iterations + 1):
        active = ~(squared.sqrt() <= tolerance * size)  # also for NaN
        if not active.any():
            return x
        if iteration == max_iterations:
            break
        image = product(direction)
        curvature = (direction * image).sum(1)
        if (active & (curvature <= 0)).any():
            raise ValueError(
                "met negative curvature beyond the damping: this checkpoint is not localised. Use a shorter "
                "window, or curvature='gauss_newton'"
            )
        length = torch.where(active, squared / curvature, 0.0)
        x = x + length[:, None] * direction
        residual = residual - length[:, None] * image
        before, squared = squared, residual.square().sum(1)
        direction = residual + torch.where(active, squared / before, 0.0)[:, None] * direction
    reached = (squared.sqrt() / size).max().item()
    raise ValueError(
        f"conjugate gradients reached a relative residual of {reached:.2g}, not {tolerance:.2g}, in "
        f"{max_iterations} iterations; raise max_iterations, or shorten the window (more damping)"
    )


def exact_solve(density: LocalDensity, gradients: Tensor) -> Tensor:
    """Solve with the dense Hessian in float64; eigenvalues below -damping/2 are raised to it.

    Raises:
        ValueError: the dense Hessian would be too large.
    """
    size = density.vector.size
    if size > _LARGEST_EXACT:
        raise ValueError(
            f"curvature='exact' needs a dense {size} x {size} matrix, at most {_LARGEST_EXACT} parameters are "
            "allowed; use 'gauss_newton' or 'hessian'"
        )
    product = hessian_product(density, len(density.task.train))
    identity = torch.eye(size, dtype=density.anchor.dtype, device=density.anchor.device)
    rows = [product(identity[i : i + _EXACT_CHUNK]) for i in range(0, size, _EXACT_CHUNK)]
    matrix = torch.cat(rows).double()
    matrix = (matrix + matrix.mT) / 2
    matrix.diagonal().add_(density.damping / 2)
    if torch.linalg.cholesky_ex(matrix).info > 0:
        values, vectors = eigh(matrix.cpu().numpy(), subset_by_value=(-np.inf, 0))
        matrix -= torch.from_numpy((vectors * values) @ vectors.T).to(matrix)
    matrix.diagonal().add_(density.damping / 2)
    solution: Tensor = torch.cholesky_solve(gradients.double().mT, torch.linalg.cholesky(matrix)).mT
    return solution.to(gradients)
