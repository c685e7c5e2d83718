"""Derivatives of the losses at one point of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from stagewise.attention import plain_attention
from stagewise.groups import Groups, per_sample
from stagewise.task import Batch, Params, Samples, Task
from stagewise.vector import ParameterVector

_ROWS = 128


def group_gradients(
    task: Task,
    vector: ParameterVector,
    params: Tensor,
    fixed: Params,
    groups: Groups,
    data: Mapping[str, Samples],
) -> Tensor:
    """Gradient of the mean loss of every group.

    Args:
        task: the model and its losses.
        vector: the parameters that move.
        params: where, ``(parameters,)``.
        fixed: parameters and buffers that do not move.
        groups: the groups.
        data: their data sets by name.

    Returns:
        ``(group, parameters)``, in nats per unit of parameter.
    """
    rows = []
    for name, index in zip(groups.datasets, groups.indices, strict=True):
        total = torch.zeros_like(params)
        for part in torch.split(index, task.forward_batch):
            batch = data[name].batch(part, task.device)
            total += grad(_mean_loss(task, vector, fixed, batch))(params) * (len(part) / len(index))
        rows.append(total)
    return torch.stack(rows)


def hessian(task: Task, vector: ParameterVector, params: Tensor, fixed: Params) -> Tensor:
    """Dense Hessian of the mean training loss at ``params``: ``(parameters, parameters)``, symmetric."""
    identity = torch.eye(len(params)).to(params)
    total = torch.zeros_like(identity)
    done = 0
    for batch in task.train.batches(task.forward_batch, task.device):
        size = min(task.forward_batch, len(task.train) - done)
        done += size
        with plain_attention():
            pull = vjp(grad(_mean_loss(task, vector, fixed, batch)), params)[1]
            total += vmap(lambda row, pull=pull: pull(row)[0], chunk_size=_ROWS)(identity) * (size / len(task.train))
    return (total + total.mT) / 2


def _mean_loss(task: Task, vector: ParameterVector, fixed: Params, batch: Batch) -> Callable[[Tensor], Tensor]:
    return lambda params: per_sample(task.losses({**fixed, **vector.unflatten(params)}, batch)).mean()
