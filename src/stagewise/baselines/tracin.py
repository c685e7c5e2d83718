"""TracIn: influence as the sum of what every update did, as if no later update cared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.baselines.intervals import intervals, read_run
from stagewise.checkpoints.trajectory import Trajectory, as_trajectory
from stagewise.during import check_during, during_attrs
from stagewise.evaluate import in_any_mode
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.labelled import influence_dataset
from stagewise.task import Task


@in_any_mode
def tracin(
    task: Task, trajectory: Trajectory | str | Path, *, groups: Labels | None = None, during: range | None = None
) -> xr.Dataset:
    """TracIn (Pruthi et al. 2020, arXiv 2002.08484) of all training up to each checkpoint.

        value[i, j](t) = - sum_{checkpoints c < t} K_c (1/n) grad l_i(w_c) . eta_c grad l_j(w_c)

    with K_c updates between checkpoint c and the next, and eta_c their learning rates: that of each parameter's group,
    0 for what is not updated, shortened where gradients were clipped. A sample's influence on itself is in it.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser, or their folder; the run before the first one is not counted.
        groups: label of every training sample; default ``task.train_groups``, or every candidate alone if there are
            at most 64.
        during: the updates whose sample weights are varied, e.g. ``range(100, 150)``; default all.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight of one sample. Negative
        is helpful. The value is 0 at the first checkpoint. Attribute ``omitted``: the checkpoints that could not be
        used, with reasons (JSON); the one before stands for the updates that follow them.

    Raises:
        ValueError: no checkpoint can be used, with the reasons (the optimizer is not SGD or was not recorded), there
            are no groups, or ``during`` is empty, has gaps or lies outside the checkpoints.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> rule = sw.Optimizer("sgd", 0.1, batch_size=0)
        >>> run = sw.Trajectory.from_checkpoints(sw.Checkpoint(step, task.state(), rule) for step in (0, 5))
        >>> sw.tracin(task, run).value.shape
        (2, 2, 1)
    """
    checkpoints, trained, queried = as_trajectory(trajectory), train_groups(task, groups), query_groups(task)
    run = read_run(task, checkpoints)
    varied = check_during(during, run.steps)
    gains = [
        -interval.time(varied) / len(task.train) * (interval.train * interval.relative) @ interval.query.T
        for interval in intervals(task, checkpoints, run, trained, queried)
    ]
    value = np.cumsum([np.zeros_like(gains[0]), *gains[:-1]], axis=0)
    attrs = {"estimator": "TracIn", **during_attrs(during), **run.found.attrs}
    return influence_dataset(value, None, run.steps, trained, queried, attrs)
