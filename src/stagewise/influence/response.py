"""Influence of a window by the optimiser's own response:  -(1/n) grad l_j^T f(H) grad l_i.

    f(H) = (1 - (1 - rate H)^W) / H,        for gradient descent.

Curvature and metric are held during the window, as in the damped form, but the response along each eigen-direction is
that of the W updates instead of 1 / (curvature + damping). A polynomial of H exists for curvature of either sign, so
that no checkpoint need be localised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.derivatives import hessian_product
from stagewise.evaluate import CURVATURE_SAMPLES, spread_rows
from stagewise.gauss_newton import gauss_newton_product
from stagewise.influence.gradients import Directions, Gradients, first_order
from stagewise.sampling.frozen_updates import FrozenUpdates, path, runaway
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.task import Task
from stagewise.varied import Per

# A subset of the training samples stands for all: its error is that of the mean of this many parts of it.
_PARTS = 4


def response_influence(
    task: Task,
    trajectory: Trajectory | str | Path,
    posterior: LocalPosterior,
    *,
    curvature: Literal["hessian", "gauss_newton"] = "hessian",
    at: Literal["path", "checkpoint"] = "path",
    per: Per | None = None,
    steps: Sequence[int] | None = None,
    samples: int = CURVATURE_SAMPLES,
) -> xr.Dataset:
    """Influence of a window by the optimiser's response at fixed curvature, at every checkpoint.

    The run's W updates are made on a quadratic form of the loss: learning rates, momentum, Adam's first moment with its
    bias correction, weight decay and clipping as the run has them, Adam's second moment held. The price is W curvature
    products with all queries stacked, and W gradients for the path; twice that where a part of the samples stands for
    all.

    To first order in the weight, a query's gradient counts where the window ends, and a candidate's where each update
    is made. ``at="path"`` therefore first makes the W updates with the gradient of the mean loss, and takes query
    gradients at the end of this path, and gradients of the candidates and the curvature in its middle: right to second
    order in its length, ``at="checkpoint"`` to first. Neither knows that Adam's second moment answers a change of the
    data too: where the loss falls fast they predict too much, and :func:`window_influence` does not.

    Args:
        task: the task; its group labels are used where it has them.
        trajectory: the run's checkpoints, or their folder.
        posterior: window, metric and the parameters that move, as for :func:`damped_influence`.
        curvature: ``"hessian"``: with the negative curvature along which training runs away early on;
            ``"gauss_newton"``: without it, for losses that call the model once.
        at: where gradients and curvature are taken, see above.
        per: as for :func:`damped_influence`.
        steps: which checkpoints, default all.
        samples: most samples that curvature and path are taken from, evenly spaced in the training set.

    Returns:
        ``value`` and ``stderr`` ``(step, train, query)``, nats per unit weight. Negative is helpful. The standard error
        is that of the samples which curvature and path are taken from, by the spread of the answers of four parts of
        them: 0 where these are all. Attribute ``omitted``: the checkpoints that could not be used, with reasons.

    Raises:
        ValueError: the posterior has no window; no checkpoint can be used, with the reasons: no record of the
            optimiser, a loss that Gauss-Newton curvature is not defined for, updates that run away at fixed curvature,
            whose response is beyond 10 times that without curvature.

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
        >>> influence = sw.response_influence(task, run, sw.LocalPosterior(window=10))
        >>> influence.value.dims, influence.value.shape
        (('step', 'train', 'query'), (1, 2, 1))
    """
    if posterior.window is None:
        raise ValueError("the response is that of a window of updates; use LocalPosterior(window=...), not gamma=")

    def solve(density: LocalDensity, gradients: Gradients) -> Directions:
        kind = gauss_newton_product if curvature == "gauss_newton" else hessian_product
        rows, updates = spread_rows(samples, len(task.train)), FrozenUpdates.of(density)

        def answer(rows: Tensor) -> Directions:
            """With curvature and path of some samples."""
            middle, end = path(density, updates, rows) if at == "path" else (density.origin, density.origin)
            targets = gradients(end)
            response = updates.respond(kind(density, middle, rows), targets)
            if reason := runaway(posterior.window, _growth(density, targets, response)):
                raise ValueError(reason)
            return Directions(response, place=middle)

        whole = answer(rows)
        if len(rows) == len(task.train):
            return whole
        unseen = (1 - len(rows) / len(task.train)) / (_PARTS - 1)
        return whole._replace(parts=[answer(rows[k::_PARTS]) for k in range(_PARTS)], unseen=unseen)

    found = first_order(task, trajectory, posterior, f"response ({curvature})", solve, steps, curvature=True, per=per)
    return found.assign_attrs(at=at)


def _growth(density: LocalDensity, gradients: Tensor, response: Tensor) -> float:
    """How far the updates go, along negative curvature or by steps too long, in units of that without curvature."""
    growth = (density.damping * response.norm(dim=1) / gradients.norm(dim=1)).nan_to_num(nan=torch.inf)
    return float(torch.where((gradients != 0).any(1), growth, 0.0).max())
