"""Adam's second moment for runs that publish their weights without it, from gradients at the checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.derivatives import mean_gradient
from stagewise.evaluate import Point, at
from stagewise.task import Task
from stagewise.vector import ParameterVector


def estimated_second_moment(
    task: Task,
    checkpoint: Checkpoint,
    optimizer: Optimizer | None = None,
    *,
    batches: int = 256,
    seed: int = 0,
) -> Checkpoint:
    """The checkpoint with Adam's second moment as it would be had gradients long been as they are there.

    Adam's second moment is a mean of squared gradients of batches over the last 1 / (1 - beta_2) updates. Here the
    batches are drawn (with replacement) at the weights of the checkpoint: their mean gradient g and its variance V over
    batches of b of the task's samples give  g^2 + (b / m) V  for the run's m samples per update, which may be more than
    the task has. What gradients were at earlier weights is not in it: it is close to the truth where gradients are
    noise (small batches, late), and too small where the loss fell within the memory of Adam and batches were large. The
    field ``estimated``, and ``metric`` of results, say that it is an estimate.

    It is enough for posteriors of a window (``metric="adam"``). What repeats updates needs the first moment too, which
    the last few batches decide, and is refused.

    Args:
        task: with training data like the run's.
        checkpoint: weights of the run.
        optimizer: the run's rule at this step, with its learning rate, ``betas`` and ``batch_size``, counted in
            samples of the task: 1,024 sequences of 2,048 tokens are 8,192 samples of 256. None: the checkpoint's own.
        batches: how many to draw.
        seed: of the draw.

    Raises:
        ValueError: no rule of Adam is given, its batch size is not known, or there are fewer than 2 batches.
        CheckpointError: the checkpoint is of another model.

    Example:
        >>> import torch, stagewise as sw
        >>> x, model = torch.randn(64, 4), torch.nn.Linear(4, 1)
        >>> task = sw.Task(model, lambda m, b: m(b).square().mean(1), train=x, queries={"q": x})
        >>> adam = sw.Optimizer("adam", 1e-3, betas=(0.9, 0.95), batch_size=8)
        >>> known = sw.estimated_second_moment(task, sw.Checkpoint(1000, model.state_dict()), adam, batches=16)
        >>> known.estimated, sorted(known.second_moment)
        (True, ['bias', 'weight'])
    """
    rule = optimizer or checkpoint.optimizer
    if rule is None or rule.name != "adam" or rule.batch_size is None:
        raise ValueError(
            "a second moment is that of Adam with a known batch size; pass the run's rule, e.g. "
            "optimizer=stagewise.Optimizer('adam', 1e-3, betas=(0.9, 0.95), batch_size=1024)"
        )
    if batches < 2:
        raise ValueError(f"batches must be 2 or more, so that they differ, got {batches}")
    point, known = at(task, replace(checkpoint, optimizer=rule, first_moment={}, second_moment={}))
    everything = replace(point, vector=ParameterVector.of(task))  # clipping looks at all that is trainable
    second = _mean_square(everything, rule.batch_size or len(task.train), batches, seed)
    if rule.clip_norm is not None:
        second = second * min(1.0, rule.clip_norm / max(math.sqrt(float(second.sum())), 1e-30)) ** 2
    named = everything.vector.unflatten(second)
    moment = {
        name: (1 - rule.betas[1] ** known.update_counts.get(name, known.step)) * named[name].cpu()
        for name in point.vector.names
    }
    return replace(known, second_moment=moment if known.step else {}, estimated=True)


def _mean_square(point: Point, batch_size: int, batches: int, seed: int) -> Tensor:
    """Mean square of the gradient of a batch ``(parameters,)``, where batches are drawn from data without end."""
    n = len(point.task.train)
    size = min(batch_size, n)
    generator = torch.Generator().manual_seed(seed)
    where = point.vector.flatten(point.state)
    mean, spread = torch.zeros_like(where), torch.zeros_like(where)
    for count in range(1, batches + 1):
        rows = torch.randint(n, (size,), generator=generator)
        gradient = mean_gradient(point, where, point.task.train, rows)
        change = gradient - mean
        mean = mean + change / count
        spread = spread + change * (gradient - mean)
    variance = spread / (batches - 1)
    return (mean.square() - variance / batches).clamp(min=0) + variance * size / batch_size
