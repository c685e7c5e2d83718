"""Whose influence a run gives: train groups, single samples or single tokens; and what of it fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from stagewise.groups import Groups, query_groups, train_groups
from stagewise.labelled import influence_dataset
from stagewise.run.config import RunConfig
from stagewise.task import Task
from stagewise.varied import Per, by_itself, counted_tokens, varied

MOST_BYTES = 2**29
"""Of the results of one estimator at all checkpoints: values and standard errors, in memory and in the run folder."""

_PAIR = 16  # bytes of a value and its standard error

_KEPT_BY_LABEL = (
    "where tokens have labels the chains keep their mean losses alone; set sampling.single_tokens=true, with another "
    "run folder"
)


def asked(task: Task, config: RunConfig) -> Per:
    """Whose influence every estimator gives."""
    return config.per or by_itself(task)


def size_of(task: Task, per: Per, steps: int) -> int:
    """Bytes of the results of one estimator.

    Raises:
        ValueError: tokens are asked for, and the loss has none.
    """
    return members(task, per) * len(query_groups(task)) * steps * _PAIR


def members(task: Task, per: Per) -> int:
    """How many groups, samples or tokens there are.

    Raises:
        ValueError: as :func:`size_of`.
    """
    if per == "group":
        return len(train_groups(task))
    return len(task.candidates) if per == "sample" else int(counted_tokens(task).sum())


def check_per(task: Task, config: RunConfig, steps: int) -> None:
    """Refuse what has no answer, or one that is too large to hold.

    Args:
        task: the task.
        config: what is asked for.
        steps: number of checkpoints.

    Raises:
        ValueError: with what to ask for instead.
    """
    per, groups = asked(task, config), task.train_groups
    if per == "group" and groups is None:
        raise ValueError("per: group needs groups, Task(train_groups=[label of every sample]); else use per: sample")
    if per == "sample" and groups is not None and groups.ndim == 2:
        raise ValueError(
            "per: sample, but the train groups are of tokens, and a sample has tokens of several: use per: token, or "
            "per: group"
        )
    size = size_of(task, per, steps)
    if size > MOST_BYTES:
        queries = len(query_groups(task))
        raise ValueError(
            f"per: {per} would be {members(task, per):,} {per}s x {queries:,} queries x {steps:,} checkpoints, "
            f"{size / 2**30:,.1f} GiB for each estimator, and {MOST_BYTES / 2**30:,.1f} GiB is the most: name fewer "
            "candidates (Task(candidates=...)), fewer queries (query_groups) or fewer steps"
        )


def no_chains_of_tokens(task: Task, config: RunConfig) -> str:
    """Why chains do not give the influence that is asked for; empty where they do."""
    by_label = task.train_groups is not None and task.train_groups.ndim == 2 and not config.sampling.single_tokens
    return _KEPT_BY_LABEL if asked(task, config) == "token" and by_label else ""


def curves_of(task: Task, single: xr.Dataset) -> xr.Dataset | None:
    """The influence whose curves are drawn, made of that of single samples or tokens without noise.

    It is that of train groups, or of samples where there are none. None where single values have errors: that of a mean
    does not follow from those of its members.
    """
    if single["stderr"].values.any():
        return None
    groups = varied(task, by_itself(task))
    rows = torch.tensor(_rows(groups, single["train"].values.tolist(), len(task.train)))
    value = torch.from_numpy(single["value"].transpose("step", "train", "query").values)
    sums = torch.zeros(len(value), len(groups) + 1, value.shape[2], dtype=value.dtype).index_add_(1, rows, value)
    mean = sums[:, :-1] / torch.tensor(groups.sizes)[:, None]
    attrs = {name: value for name, value in single.attrs.items() if name != "member"}
    return influence_dataset(mean.numpy(), None, single["step"].values.tolist(), groups, query_groups(task), attrs)


def _rows(groups: Groups, labels: Sequence[str], n: int) -> list[int]:
    """The group that each sample ``"12"`` or token ``"12/3"`` is in; ``len(groups)`` for none."""
    places = groups.places(n).numpy()
    index = np.array([[int(part) for part in label.split("/")] for label in labels])
    return list(places[tuple(index[:, : places.ndim].T)].tolist())
