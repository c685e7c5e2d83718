"""Damped influence functions:  -(1/n) grad l_j^T (H + damping P^-1)^-1 grad l_i,  damping = gamma / n_beta.

With ``window=W`` the damping is 1 / (learning_rate * W) in the optimiser's metric, and this is the first-order
effect of re-weighting sample i during W steps. One linear solve per query, then one pass over the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xarray as xr
from scipy.linalg import eigh
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.derivatives import Product, dense, hessian_product
from stagewise.evaluate import CURVATURE_SAMPLES, spread_rows
from stagewise.gauss_newton import gauss_newton_product
from stagewise.influence.gradients import Directions, Gradients, first_order
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.task import Task
from stagewise.varied import Per

CurvatureKind = Literal["gauss_newton", "hessian", "exact"]
_LARGEST_EXACT = 6000
# A subset of the training samples stands for all: its error is that of the mean of this many parts of it.
_PARTS = 4
_ERROR_TOLERANCE = 0.1


def damped_influence(
    task: Task,
    trajectory: Trajectory | str | Path,
    posterior: LocalPosterior,
    *,
    curvature: CurvatureKind = "gauss_newton",
    per: Per | None = None,
    steps: Sequence[int] | None = None,
    samples: int = CURVATURE_SAMPLES,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
) -> xr.Dataset:
    """Damped influence function at every checkpoint.

    Args:
        task: the task; its group labels are used where it has them.
        trajectory: the run's checkpoints, or their folder.
        posterior: metric and damping.
        curvature: ``"gauss_newton"``: matrix-free, positive definite everywhere, any model whose loss calls it
            once; ``"hessian"``: matrix-free, only where the posterior is localised; ``"exact"``: the dense
            Hessian of all samples, up to 6000 parameters. It raises eigenvalues below minus
            half the damping to that; at a checkpoint that is not localised the answer then exists, but is not to
            be trusted.
        per: influence of each train group, each candidate, or each token of the candidates; default groups where the
            task has them, else candidates. The solve is the same.
        steps: which checkpoints, default all.
        samples: most samples that the matrix-free curvatures are taken from, evenly spaced in the training set.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: of conjugate gradients, per checkpoint.

    Returns:
        ``value`` and ``stderr`` ``(step, train, query)``, nats per unit weight. Negative is helpful. The standard error
        is that of the samples which the curvature is taken from and of the solver's tolerance: 0 for ``"exact"``.
        Attribute ``omitted``: the checkpoints that could not be used, with reasons: negative curvature
        (``"hessian"``), no convergence.

    Raises:
        ValueError: no checkpoint can be used, with the reasons: too many parameters (``"exact"``), a loss that
            Gauss-Newton curvature is not defined for, no groups or tokens to ask about.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> run = sw.Trajectory.from_checkpoints([start])
        >>> influence = sw.damped_influence(task, run, sw.LocalPosterior(window=10), curvature="exact")
        >>> influence.value.dims, influence.value.shape
        (('step', 'train', 'query'), (1, 2, 1))
    """

    def solve(density: LocalDensity, gradients: Gradients) -> Directions:
        targets = gradients(density.origin)
        if curvature == "exact":
            return Directions(exact_solve(density, targets))
        kind = gauss_newton_product if curvature == "gauss_newton" else hessian_product
        rows = spread_rows(samples, len(task.train))
        product = kind(density, density.origin, rows)

        def solved(targets: Tensor, precision: float) -> Tensor:
            return conjugate_gradients(lambda v: product(v) + density.damping * v, targets, precision, max_iterations)

        mean = solved(targets, tolerance)
        if len(rows) == len(task.train):
            return Directions(mean, relative=tolerance)
        # The solution answers a change of the curvature by -A^-1 (change) x, here for each part of the samples.
        whole = product(mean)
        parts = [kind(density, density.origin, rows[k::_PARTS])(mean) - whole for k in range(_PARTS)]
        unseen = (1 - len(rows) / len(task.train)) / (_PARTS - 1)
        errors = torch.stack([solved(part, _ERROR_TOLERANCE) for part in parts]) * unseen**0.5
        return Directions(mean, errors, tolerance)

    name = f"damped influence ({curvature})"
    return first_order(task, trajectory, posterior, name, solve, steps, curvature=True, per=per)


def conjugate_gradients(product: Product, targets: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Solve A x = b for every row of ``targets (k, parameters)`` at once; A positive definite.

    Raises:
        ValueError: a direction of negative curvature, or no convergence, with the residual reached.
    """
    x, residual = torch.zeros_like(targets), targets
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
    matrix = dense(hessian_product(density, density.origin), density.origin).double()
    matrix.diagonal().add_(density.damping / 2)
    if torch.linalg.cholesky_ex(matrix).info > 0:
        values, vectors = eigh(matrix.cpu().numpy(), subset_by_value=(-np.inf, 0))
        matrix -= torch.from_numpy((vectors * values) @ vectors.T).to(matrix)
    matrix.diagonal().add_(density.damping / 2)
    solution: Tensor = torch.cholesky_solve(gradients.double().mT, torch.linalg.cholesky(matrix)).mT
    return solution.to(gradients)
