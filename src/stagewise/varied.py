"""Whose weight influence is a derivative by: train groups, candidates one by one, or their tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stagewise.evaluate import chunks
from stagewise.groups import TRAIN, Groups, Labels, train_groups
from stagewise.task import Task

Per = Literal["group", "sample", "token"]


def varied(task: Task, per: Per, groups: Labels | None = None) -> Groups:
    """Whose weight is varied.

    Args:
        task: the task.
        per: each train group, each candidate, or each token of the candidates.
        groups: labels of the train groups.

    Raises:
        ValueError: there are no groups, ``groups`` where every sample or token is asked for, or losses without tokens.
    """
    if per == "group":
        return train_groups(task, groups)
    if groups is not None:
        raise ValueError(f"groups= are for per='group'; with per={per!r} every {per} has an influence of its own")
    if per == "sample":
        candidates = task.candidates
        return Groups(tuple(map(str, candidates.tolist())), (TRAIN,) * len(candidates), tuple(candidates[:, None]))
    counted = counted_tokens(task)
    tokens, places = counted.shape[1], counted.flatten().nonzero()
    labels = tuple(f"{place // tokens}/{place % tokens}" for place in places[:, 0].tolist())
    return Groups(labels, (TRAIN,) * len(labels), tuple(places), {TRAIN: tokens})


def by_itself(task: Task) -> Per:
    """What a task is asked about by itself: its train groups, or every sample where it has none."""
    return "sample" if task.train_groups is None else "group"


def counted_tokens(task: Task) -> Tensor:
    """Which tokens of the candidates count in the objective ``(samples, tokens)``: it depends on the data alone.

    Raises:
        ValueError: the loss returns one number per sample.
    """
    rows: list[Tensor] = []
    for batch in chunks(task, task.train):
        with torch.no_grad():
            shares = task.shares(task.weighted_losses(task.state(), batch)).cpu()
        if shares.ndim == 1:
            raise ValueError("per='token' needs a loss that returns (batch, tokens); this one returns (batch,)")
        rows += (shares > 0).unbind()
    counted = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    candidate = torch.zeros(len(counted), 1, dtype=torch.bool)
    candidate[task.candidates] = True
    return counted & candidate
