"""All that a run will need after the sampling, tried on a few samples before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.data import Samples
from stagewise.groups import query_groups, train_groups
from stagewise.results import BIF
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.start import check_order, start_at
from stagewise.run.analysis import recorded_order, retraining_window
from stagewise.run.config import Retraining, RunConfig
from stagewise.run.estimators import NAMES, SAMPLED, estimate
from stagewise.run.exemplars import check_texts
from stagewise.run.per import check_per, no_chains_of_tokens
from stagewise.task import Task

_FEW = 8


def preflight(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> dict[str, str]:
    """Try groups, names, batch order, retraining and the estimators without chains.

    Args:
        task: the task.
        trajectory: the run's checkpoints.
        config: what is asked for.
        steps: the checkpoints that can be used.

    Returns:
        The estimators that cannot be computed for this model or loss, with the reasons: the run goes on without them.

    Raises:
        ValueError: what was asked for cannot be done, with the setting to change.
    """
    query_groups(task)
    check_per(task, config, len(steps))
    check_texts(task)
    window, small, checkpoint = retraining_window(config), miniature(task), trajectory.load(steps[-1])
    # The run's own batches name samples that the small task does not have.
    alone = Trajectory.from_checkpoints([checkpoint.followed_by(checkpoint.coming_rates)])
    if window is not None:
        train_groups(task)
        order = recorded_order(task, trajectory, config)
        try:
            start = start_at(task, checkpoint)
            if order is not None:
                check_order(start, order)
            window_ablation(small, alone, window=1, repeats=1)
        except ValueError as error:
            raise ValueError(f"retraining is not possible here: {error}. Without it: -s retraining=null") from error
    missing: dict[str, str] = {}
    brief = config.model_copy(update={"retraining": Retraining(repeats=2)})
    for name in (name for name in config.estimators if name in NAMES):
        try:
            estimate(name, small, alone, brief)()
        except ValueError as error:
            missing[NAMES[name]] = str(error)
    if missing and len(missing) == len(config.estimators):
        reasons = dict.fromkeys(missing.values())
        each = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise ValueError(next(iter(reasons)) if len(reasons) == 1 else each)
    if SAMPLED in config.estimators and (reason := no_chains_of_tokens(task, config)):
        missing[f"{BIF} of tokens"] = reason
    return missing


def miniature(task: Task) -> Task:
    """The same task with a few of its samples, the longest among them: rows of labels are as long as its losses."""
    rows = task.candidates[torch.linspace(0, len(task.candidates) - 1, min(_FEW, len(task.candidates))).long()]
    rows = _with_longest(rows, task.train)
    few = {name: _with_longest(data.few(_FEW), data) for name, data in task.queries.items()}
    return Task(
        task.model,
        task.loss,
        train=task.train.subset(rows),
        queries={name: data.subset(few[name]) for name, data in task.queries.items()},
        train_groups=None if task.train_groups is None else task.train_groups[rows.numpy()].tolist(),
        query_groups={
            name: labels[few[name].numpy()].tolist() for name, labels in task.query_groups.items() if labels is not None
        },
        query_losses=task.query_losses,
        objective=task.objective,
        forward_batch=task.forward_batch,
    )


def _with_longest(rows: Tensor, data: Samples) -> Tensor:
    if data.sizes[rows].max() < data.sizes.max():
        rows = torch.cat([rows, data.sizes.argmax()[None]]).sort().values
    return rows
