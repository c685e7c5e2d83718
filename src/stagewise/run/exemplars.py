"""The single training samples that matter most for a query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.utils._pytree import tree_flatten

from stagewise.influence.bif import bif
from stagewise.results import Exemplar
from stagewise.run.analysis import spread
from stagewise.task import Samples, Task
from stagewise.traces.store import TraceStore

OfSamples = Callable[[list[int], list[Any]], xr.Dataset]
"""Influence of every candidate on some queries at some steps."""


def sampled_samples(store: TraceStore, steps: list[int], queries: list[Any]) -> xr.Dataset:
    """From the chains."""
    return bif(_SampleBySample(store, steps)).sel(query=queries)


def exemplars(
    task: Task, samples: OfSamples, influence: xr.Dataset, count: int, steps: int = 4, queries: int = 3
) -> list[Exemplar]:
    """The most helpful and most harmful training samples of the queries that change most, at a few steps.

    Samples are ranked by value / stderr, so that a large but noisy value does not lead; by value where none is noisy.
    """
    if count == 0 or "query" not in influence.dims:
        return []
    chosen = spread(influence["step"].values.tolist(), steps)
    change = abs(influence["value"]).max("train").std("step")
    names = influence["query"].values[np.argsort(-change.values)][:queries].tolist()
    of_samples = samples(chosen, names)
    index = of_samples["train"].values.astype(int)
    groups = task.train_groups
    labels = np.full(len(task.train), "") if groups is None or groups.ndim == 2 else groups
    found = []
    for query in names:
        for step in chosen:
            cell = of_samples.sel(step=step, query=query)
            value, stderr = cell["value"].values, cell["stderr"].values
            noisy = np.divide(value, stderr, out=np.zeros_like(value), where=stderr > 0)
            ranked = np.argsort(noisy if stderr.any() else value)
            rows = np.concatenate([ranked[:count], ranked[::-1][:count]])
            picked = index[rows].tolist()
            found.append(
                Exemplar(
                    str(query),
                    step,
                    picked,
                    [str(labels[i]) for i in picked],
                    value[rows].tolist(),
                    stderr[rows].tolist(),
                    _images(task.train, picked),
                )
            )
    return found


class _SampleBySample:
    """A store seen at some steps, with grouped queries but every training sample on its own."""

    def __init__(self, store: TraceStore, steps: Sequence[int]) -> None:
        self.steps = steps
        self.load = store.load
        self.labels = store.labels | {"train": None}
        self.verdicts: Mapping[int, tuple[str, str]] = getattr(store, "verdicts", {})


def _images(samples: Samples, index: Sequence[int]) -> np.ndarray[Any, Any] | None:
    """The samples as pictures, if their first tensor looks like some: (h, w), (1, h, w) or (3, h, w)."""
    leaf = tree_flatten(samples.batch(torch.tensor(list(index))))[0][0]
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return None
    if leaf.ndim == 4 and leaf.shape[1] in (1, 3):
        leaf = leaf.squeeze(1) if leaf.shape[1] == 1 else leaf.permute(0, 2, 3, 1)
    elif leaf.ndim != 3 or min(leaf.shape[1:]) < 4:
        return None
    low, high = leaf.min(), leaf.max()
    return ((leaf - low) / (high - low).clamp(min=1e-12)).double().cpu().numpy()
