"""What a transformer's attention and losses tell of what it has learnt, and such measures along a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.task import Task

Numbers = dict[str, float]

DESCRIPTIONS = {
    "previous_token": "attention to the token before, mean over places, of the head that has most",
    "prefix_matching": "attention to what followed the current token before, beyond even attention, of the best head",
    "in_context": "loss at the last tenth of the places minus that at the first tenth, nats",
}


def along(
    task: Task, run: Trajectory, measured: Callable[[Any], Numbers], descriptions: Mapping[str, str]
) -> xr.Dataset:
    """Measures of the network at every checkpoint of a run: variables ``(step)``, each with its ``description``."""
    rows = []
    for step in run.steps:
        with torch.no_grad(), task.pure.holding(task.fitted(run.load(step)).params) as model:
            rows.append(measured(model))
    variables = {name: ("step", [row[name] for row in rows], {"description": descriptions[name]}) for name in rows[0]}
    return xr.Dataset(variables, {"step": list(run.steps)})


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis, nats: what q loses on tokens that follow p."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def previous_token(patterns: Tensor) -> float:
    """Mean attention from each place but the first to the one before, of the head that has most.

    Args:
        patterns: ``(layers, batch, heads, tokens, tokens)``.
    """
    return float(patterns.diagonal(-1, -2, -1).mean((1, 3)).max())


def prefix_matching(patterns: Tensor, tokens: Tensor, first: int = 1) -> float:
    """Attention to what came after earlier occurrences of the current token, less the share that even attention has.

    With as few tokens as here an induction head has many places to look at, and is best if it looks at all of them, not
    only at the one a period ago. Where tokens are many there is only that one, and this is the usual score but for the
    even share.

    Args:
        patterns: ``(layers, batch, heads, tokens, tokens)``.
        tokens: ``(batch, tokens)``.
        first: first place from which attention counts.

    Returns:
        The mean over places of the head that has most: 0 for even attention, below 1.
    """
    length = tokens.shape[1]
    before = torch.zeros(len(tokens), length, length, dtype=torch.bool)
    before[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    wanted = (before & seen).to(patterns.dtype)
    even = wanted.sum(-1) / torch.arange(1, length + 1)
    excess = (patterns * wanted[:, None]).sum(-1) - even[:, None]
    return float(excess[..., first:].mean((1, 3)).max())


def in_context(losses: Tensor) -> float:
    """How much better late tokens of a sequence are predicted than early ones: negative if they are.

    Args:
        losses: ``(batch, tokens)``, nats.
    """
    tenth = max(1, losses.shape[1] // 10)
    return float(losses[:, -tenth:].mean() - losses[:, :tenth].mean())
