"""Gradient products, and the forward-mode pass that scores every training sample along given directions.

Everything here is deterministic: ``stderr`` is zero. All vectors are in the whitened coordinates of the
posterior, so that its metric (Euclidean or the optimiser's) is already inside the dot product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.func import grad, jvp, vmap

from stagewise.attention import plain_attention
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import Groups, per_sample, query_groups, train_groups
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.task import Task

Solve = Callable[[LocalDensity, Tensor], Tensor]
"""Query gradients ``(query, parameters)`` at a checkpoint to the directions of the same shape to score along."""


def gradient_product(
    task: Task, trajectory: Trajectory, posterior: LocalPosterior, *, steps: Sequence[int] | None = None
) -> xr.Dataset:
    """Gradient dot products in the posterior's metric P: the limit of a short window (large gamma).

        - (kappa / gamma) grad l_j^T P grad l_i ;    with a window, kappa / gamma = learning_rate * W / n.

    Args:
        task: the task; its group labels are used where it has them.
        trajectory: the run's checkpoints.
        posterior: metric and scale.
        steps: which checkpoints, default all.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight. Negative is helpful.
    """
    return first_order(task, trajectory, posterior, "gradient product", lambda density, g: g / density.damping, steps)


def first_order(
    task: Task,
    trajectory: Trajectory,
    posterior: LocalPosterior,
    estimator: str,
    solve: Solve,
    steps: Sequence[int] | None = None,
) -> xr.Dataset:
    """Influence  -(1/n) grad l_i . solve(grad l_j)  at every checkpoint; see :func:`gradient_product`.

    Raises:
        ValueError: a step is not recorded, the losses are unusable (see ``Task.check``), or a checkpoint lacks
            what the posterior needs.
    """
    chosen = trajectory.steps if steps is None else tuple(steps)
    if not chosen or (unknown := sorted(set(chosen) - set(trajectory.steps))):
        raise ValueError(f"steps {unknown if chosen else []} are not recorded; there are {list(trajectory.steps)}")
    queries = query_groups(task)
    trains = train_groups(task) if task.train_groups is not None else None
    rows = []
    for step in chosen:
        density = posterior.at(task, trajectory.load(step))
        task.check(density.state)
        directions = solve(density, query_gradients(density, queries))
        scores = directional_derivatives(density, directions)
        if trains is not None:
            scores = trains.mean({"train": scores})
        rows.append((-scores.T / len(task.train)).double().cpu().numpy())
    value = np.stack(rows)
    coords = {
        "step": list(chosen),
        "train": list(trains.labels) if trains else [str(i) for i in range(len(task.train))],
        "query": list(queries.labels),
        "train_size": ("train", list(trains.sizes) if trains else [1] * len(task.train)),
        "query_size": ("query", list(queries.sizes)),
    }
    dims = ("step", "train", "query")
    result = xr.Dataset({"value": (dims, value), "stderr": (dims, np.zeros_like(value))}, coords)
    result.attrs = {
        "estimator": estimator,
        "units": "nats per unit weight",
        "sign": "negative = helpful: more weight on the training data lowers the query loss",
        "metric": density.metric,
    } | ({"window": posterior.window} if posterior.window else {"gamma": density.gamma})
    for name in result.data_vars:
        result[name].attrs["units"] = result.attrs["units"]
    return result


def query_gradients(density: LocalDensity, queries: Groups) -> Tensor:
    """Whitened gradient of the mean loss of every query group, ``(query, parameters)``."""
    origin, rows = torch.zeros_like(density.anchor), []
    for dataset, index in zip(queries.datasets, queries.indices, strict=True):
        data, total = density.task.queries[dataset], torch.zeros_like(density.anchor)
        for part in torch.split(index, density.task.forward_batch):
            batch = data.batch(part, density.task.device)
            total += grad(density.mean_loss)(origin, batch) * (len(part) / len(index))
        rows.append(total)
    return torch.stack(rows)


def directional_derivatives(density: LocalDensity, directions: Tensor) -> Tensor:
    """Derivative of every training sample's loss along each direction: one forward-mode pass over the data.

    Args:
        density: where.
        directions: ``(direction, parameters)``, whitened.

    Returns:
        ``(direction, sample)``: grad l_i . x, a sample's loss being the mean over its tokens.
    """
    origin = torch.zeros_like(density.anchor)
    scores = []
    with torch.no_grad(), plain_attention():
        for batch in density.task.train.batches(density.task.forward_batch, density.task.device):

            def along(x: Tensor, batch: object = batch) -> Tensor:
                derivative: Tensor = jvp(lambda u: density.losses(u, batch), (origin,), (x,))[1]
                return per_sample(derivative)

            scores.append(vmap(along)(directions))
    return torch.cat(scores, dim=1)
