"""TracIn: influence as the sum of what every update did, as if no later update cared."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.retraining.intervals import intervals
from stagewise.retraining.labelled import influence_dataset
from stagewise.retraining.schedule import check_window
from stagewise.task import Task


def tracin(
    task: Task, trajectory: Trajectory, *, groups: Labels | None = None, window: range | None = None
) -> xr.Dataset:
    """TracIn (Pruthi et al. 2020, arXiv 2002.08484) of all training up to each checkpoint.

        value[i, j](t) = - sum_{checkpoints c < t} eta_c K_c (1/n) grad l_i(w_c) . grad l_j(w_c)

    with K_c updates of learning rate eta_c between checkpoint c and the next.

    Args:
        task: the model, its losses and data.
        trajectory: the run's checkpoints, with optimiser; the run before the first one is not counted.
        groups: label of every training sample; default ``task.train_groups``, or every sample alone in a set
            of at most 64.
        window: the updates whose sample weights are varied, e.g. ``range(100, 150)``; default all.

    Returns:
        ``value`` and ``stderr`` (zero) ``(step, train, query)``, nats per unit weight of one sample. Negative
        is helpful. The value is 0 at the first checkpoint.

    Raises:
        ValueError: the optimizer is not SGD or was not recorded, there are no groups, or the window is empty, has
            gaps or lies outside the checkpoints.
        CheckpointError: a checkpoint is of another model.
    """
    trained, queried, varied = train_groups(task, groups), query_groups(task), check_window(window, trajectory.steps)
    gains = [
        -interval.time(varied) / len(task.train) * interval.train @ interval.query.T
        for interval in intervals(task, trajectory, trained, queried)
    ]
    value = np.cumsum([np.zeros_like(gains[0]), *gains[:-1]], axis=0)
    attrs = {"estimator": "TracIn"} | ({"window": [window.start, window.stop]} if window else {})
    return influence_dataset(value, trajectory.steps, trained, queried, attrs)
