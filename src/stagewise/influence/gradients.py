"""Gradient products, and the pass that scores every candidate along given directions.

All vectors are in the whitened coordinates of the posterior, so that its metric (Euclidean or the optimiser's) is
already inside the dot product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.derivatives import directional_derivatives, group_gradients
from stagewise.evaluate import sample_weights
from stagewise.groups import TRAIN, Groups, query_groups
from stagewise.labelled import member_of
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.task import Task
from stagewise.usable import at_usable
from stagewise.varied import Per, by_itself, varied

# So many gradients of groups are cheaper than a second derivative along one direction.
_FEW = 4


class Directions(NamedTuple):
    """What the losses of the candidates are differentiated along, at one checkpoint.

    Attributes:
        mean: one direction per query ``(query, parameters)``.
        errors: deviations from it, whose mean square over ``error`` is the variance of ``mean``
            ``(error, query, parameters)``; none where it is exact.
        relative: error of a value, relative to the largest of its query: of a solver's tolerance.
        place: where the losses are differentiated, a displacement ``(parameters,)``; None: at the checkpoint.
        parts: answers of parts of the samples, each with a place of its own.
        unseen: variance of a value over the mean square by which those of the parts deviate from it.
    """

    mean: Tensor
    errors: Tensor | None = None
    relative: float = 0.0
    place: Tensor | None = None
    parts: Sequence[Directions] = ()
    unseen: float = 0.0


Gradients = Callable[[Tensor], Tensor]
"""A displacement ``(parameters,)`` to the gradients of the queries there ``(query, parameters)``."""

Solve = Callable[[LocalDensity, Gradients], Directions]
"""Query gradients near a checkpoint to the directions to score along."""


def gradient_product(
    task: Task,
    trajectory: Trajectory | str | Path,
    posterior: LocalPosterior,
    *,
    per: Per | None = None,
    steps: Sequence[int] | None = None,
) -> xr.Dataset:
    """Gradient dot products in the posterior's metric P: the limit of a short window (large gamma).

        - (kappa / gamma) grad l_j^T P grad l_i ;    with a window, kappa / gamma = learning_rate * W / n.

    Args:
        task: the task; its group labels are used where it has them.
        trajectory: the run's checkpoints, or their folder.
        posterior: metric and scale.
        per: influence of each train group, each candidate, or each token of the candidates; default groups where the
            task has them, else candidates.
        steps: which checkpoints, default all.

    Returns:
        ``value`` and ``stderr`` (zero: it is exact) ``(step, train, query)``, nats per unit weight. Negative is
        helpful. Attribute ``omitted``: the checkpoints that could not be used, with reasons.

    Raises:
        ValueError: a step is not recorded, no checkpoint can be used, with the reasons, or there are no groups or
            tokens to ask about.

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
        >>> influence = sw.gradient_product(task, run, sw.LocalPosterior(window=10))
        >>> influence.value.dims, influence.value.shape
        (('step', 'train', 'query'), (1, 2, 1))
    """

    def solve(density: LocalDensity, gradients: Gradients) -> Directions:
        return Directions(gradients(density.origin) / density.damping)

    return first_order(task, trajectory, posterior, "gradient product", solve, steps, per=per)


def first_order(
    task: Task,
    trajectory: Trajectory | str | Path,
    posterior: LocalPosterior,
    estimator: str,
    solve: Solve,
    steps: Sequence[int] | None = None,
    curvature: bool = False,
    per: Per | None = None,
) -> xr.Dataset:
    """Influence  -(1/n) grad l_i . solve(grad l_j)  at every checkpoint; see :func:`gradient_product`."""
    run, queried = as_trajectory(trajectory), query_groups(task)
    trained = varied(task, per or by_itself(task))

    def estimate(step: int) -> tuple[np.ndarray, np.ndarray, LocalDensity]:
        density = posterior.at(task, run.load(step), curvature=curvature)
        directions = solve(density, partial(group_gradients, density, groups=queried))
        value = scores(density, directions, trained)
        variance = (directions.relative * value.abs().amax(0)) ** 2 + torch.zeros_like(value)
        if directions.errors is not None:
            squares = [scores(density, Directions(error), trained) ** 2 for error in directions.errors]
            variance += torch.stack(squares).mean(0)
        if directions.parts:
            squares = [(scores(density, part, trained) - value) ** 2 for part in directions.parts]
            variance += directions.unseen * torch.stack(squares).mean(0)
        return value.numpy(), variance.sqrt().numpy(), density

    found = at_usable(run, steps, estimate)
    density = found.results[-1][2]
    coords = {
        "step": found.steps,
        "train": list(trained.labels),
        "query": list(queried.labels),
        "train_size": ("train", list(trained.sizes)),
        "query_size": ("query", list(queried.sizes)),
    }
    dims = ("step", "train", "query")
    value, stderr = np.stack([v for v, _, _ in found.results]), np.stack([e for _, e, _ in found.results])
    units = {"units": "nats per unit weight"}
    variables = {"value": (dims, value, units), "stderr": (dims, stderr, units)}
    about = {"window": posterior.window} if posterior.window else {"gamma": density.gamma, "n_beta": density.n_beta}
    sign = {"sign": "negative = helpful: more weight on the training data lowers the query loss"}
    attrs = {"estimator": estimator} | units | sign | member_of(trained) | {"metric": density.metric} | about
    return xr.Dataset(variables, coords, attrs | found.attrs)


def scores(density: LocalDensity, directions: Directions, trained: Groups) -> Tensor:
    """-(1/n) (a_i / mean a) grad l_i . x, the mean over every train group: ``(train, direction)``, float64, CPU."""
    task, n = density.task, len(density.task.train)
    place, along = density.origin if directions.place is None else directions.place, directions.mean
    if len(trained) <= _FEW * len(along):
        return -(group_gradients(density, place, trained) @ along.mT).cpu().double() / n
    each = trained.tokens or 1
    derivatives, weights = directional_derivatives(density, place, along, task.candidate_samples, tokens=trained.tokens)
    weighted = torch.zeros(len(along), n, each, dtype=torch.float64)
    relative = weights / sample_weights(density).mean()
    weighted[:, task.candidates] = (derivatives * relative).reshape(len(along), -1, each)
    return -trained.mean({TRAIN: weighted.flatten(1)}).T / n
