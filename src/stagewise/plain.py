"""The losses as the user's own code computes them: what everything else is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stagewise.attention import slow_path
from stagewise.data import Samples
from stagewise.memory import out_of_memory
from stagewise.task import Batch, Losses, Task, evaluated


def plain_losses(
    task: Task, model: nn.Module, data: Samples, query: str | None, batch: Batch, grad: bool = False
) -> Losses:
    """Losses of an ordinary module on a batch of ``data``.

    Raises:
        ValueError: they cannot be evaluated, or are no losses; the message names the data.
    """
    loss = task.loss if query is None else task.query_losses.get(query, task.loss)
    try:
        with slow_path(), torch.inference_mode(False), torch.set_grad_enabled(grad):
            return evaluated(loss, model, batch)
    except Exception as error:
        if out_of_memory(error):
            raise
        if isinstance(error, ValueError) and str(error).startswith("the loss returned"):
            raise ValueError(f"{data.name}: {error}") from None
        raise ValueError(f"{data.name}: {cannot(error)}") from error


def objective(task: Task, losses: Losses) -> Tensor:
    """Their weighted mean."""
    values, weights = task.by_sample(losses)
    return (weights * values).sum() / weights.sum().clamp(min=1e-30)


def cannot(error: Exception, how: str = "") -> str:
    """Why a loss cannot be evaluated, in one line."""
    line = str(error).strip().split("\n")[0]
    return f"the loss cannot be evaluated{' ' + how if how else ''}: {type(error).__name__}: {line}"
