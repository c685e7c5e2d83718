"""Weights for the next window of a training loop, chosen from the exact influence of the moment.

To first order, weights beta during a window change a query's loss by  sum_i influence_i (beta_i - 1).  Of all weights
of mean 1 between 1 - budget and most, that is least where those of the most helpful data are ``most``, as far as the
budget goes, and all others 1 - budget: a linear programme, filled from the most helpful on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import Labels
from stagewise.labelled import Array
from stagewise.retraining.window_influence import window_influence
from stagewise.task import Task
from stagewise.varied import Per, varied


def curriculum(
    task: Task,
    checkpoint: Checkpoint,
    query: str,
    *,
    window: int,
    budget: float = 0.5,
    most: float = 2.0,
    per: Per = "group",
    groups: Labels | None = None,
    repeats: int | None = None,
    seed: int = 0,
    memory: float = 4e9,
) -> Tensor:
    """Weights of the training data for the next ``window`` updates, those that lower a query's loss most.

    Exact influence on the query is computed from the checkpoint on, over batches that are drawn for it: nothing is
    known of those to come. To first order no other weights of mean 1 between ``1 - budget`` and ``most`` lower the
    query more. A mean of 1 keeps gradients, and with them the learning rate, as large as they were. Nothing is
    remembered from call to call.

    Args:
        task: the model, its losses and data.
        checkpoint: where training stands, with its optimiser: ``snapshot(step, model, optimizer, batch_size=...)`` in
            a training loop, ``run.load(step)`` of a recorded run.
        query: name of the query group whose loss is to fall.
        window: number of updates that the weights are for.
        budget: share of all weight that is moved, above 0 and at most 1.
        most: largest weight, above 1. A share ``budget / (most - 1 + budget)`` of the data has it.
        per: one weight for each train group, each candidate, or each token of the candidates. For samples and tokens
            influence is that at the rate at which they are drawn, which takes passes over the training set.
        groups: label of every training sample, or of every token ``(samples, tokens)``; default ``task.train_groups``.
            With ``per="group"`` only.
        repeats: number of batch orders to average over, see :func:`window_influence`; default four.
        seed: of these.
        memory: bytes that replayed states may take.

    Returns:
        Weights ``(samples,)`` or ``(samples, tokens)`` of the whole training set, float32, on the CPU: multiply losses
        by ``weights[indices]``. Their mean is 1. What is in no group, or no candidate, has weight 1.

    Raises:
        ValueError: budget, most or window is out of range, no query group is called so, or exact influence cannot be
            had or is not finite at this checkpoint.
        TypeError: ``checkpoint`` is not a checkpoint.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"first": (x[:1], y[:1])}, train_groups=list("abcd"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> weights = sw.curriculum(task, start, "first", window=3, budget=0.5, most=2.5)
        >>> weights.shape, round(weights.mean().item(), 6), weights.max().item()
        (torch.Size([4]), 1.0, 2.5)
    """
    if not isinstance(checkpoint, Checkpoint):
        got = type(checkpoint).__name__
        raise TypeError(f"expected a Checkpoint, got {got}; use run.load(step), or snapshot(step, model, optimizer)")
    if not 0 < budget <= 1 or not most > 1:
        raise ValueError(f"need 0 < budget <= 1 and most > 1, got {budget} and {most}")
    here = Trajectory.from_checkpoints([checkpoint.followed_by(checkpoint.coming_rates)])  # batches to come are unknown
    influence = window_influence(
        task,
        here,
        window=window,
        per=per,
        expected=per != "group",
        groups=groups,
        queries=[query],
        repeats=repeats,
        seed=seed,
        mode="reverse",
        memory=memory,
    )
    values = influence["value"].values[0, :, 0]
    if not np.isfinite(values).all():
        raise ValueError(f"training from step {checkpoint.step} does not stay finite for {window} updates")
    trained = varied(task, per, groups)
    weights = torch.ones((len(task.train), trained.tokens) if trained.tokens else (len(task.train),))
    filled = _filled(values, np.array(trained.sizes), budget, most).tolist()
    for index, weight in zip(trained.indices, filled, strict=True):
        weights.view(-1)[index] = weight
    return weights


def _filled(values: Array, sizes: Array, budget: float, most: float) -> Array:
    """The weight of every group, the members of the most helpful ones up to ``most``, of mean 1 over all members."""
    order, room = np.argsort(values, kind="stable"), most - (1 - budget)
    shares = sizes[order] / sizes.sum()
    left = budget - room * (shares.cumsum() - shares)
    weights = np.empty(len(values))
    weights[order] = 1 - budget + np.clip(left / shares, 0, room)
    return weights
