"""From traces to results: influence, events, baselines, measured effects and exemplars of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.utils._pytree import tree_flatten

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import query_groups
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.report.results import Exemplar
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.schedule import BatchOrder
from stagewise.run.config import RunConfig
from stagewise.run.progress import Progress
from stagewise.task import Samples, Task
from stagewise.traces.store import TraceStore


def mean_losses(task: Task, trajectory: Trajectory, steps: Sequence[int]) -> xr.Dataset:
    """Mean loss of the training set and of every query group at every checkpoint, nats."""
    groups = query_groups(task)
    train, queries = [], []
    for step in steps:
        state = task.state() | {k: v.to(task.device) for k, v in trajectory.load(step).params.items()}
        train.append(_losses(task, state, task.train).mean().item())
        by_name = {name: _losses(task, state, data) for name, data in task.queries.items()}
        queries.append(groups.mean(by_name).tolist())
    return xr.Dataset(
        {"train": ("step", train), "queries": (("step", "query"), queries)},
        {"step": list(steps), "query": list(groups.labels)},
    )


def baselines(
    task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int], progress: Progress
) -> dict[str, xr.Dataset]:
    """The deterministic estimators of the same influence, by name."""
    estimators: dict[str, Any] = {"gradient product": gradient_product, "damped influence": damped_influence}
    results: dict[str, xr.Dataset] = {}
    for name in config.baselines:
        rows = []
        for done, step in enumerate(steps, start=1):
            rows.append(estimators[name](task, trajectory, config.posterior, steps=[step]))
            progress(name, done, len(steps))
        results[name] = xr.concat(rows, "step", combine_attrs="override")
    return results


def measure(
    task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int], progress: Progress
) -> xr.Dataset | None:
    """Measured window effects, if asked for."""
    settings = config.retraining
    if settings is None:
        return None
    window = settings.window or config.posterior.window
    if window is None:
        raise ValueError("retraining needs a window: set retraining.window, or posterior.window instead of gamma")
    order = None
    if settings.recorded_order_seed is not None:
        optimizer = trajectory.load(steps[0]).optimizer
        size = (optimizer.batch_size if optimizer else None) or 0
        order = BatchOrder(len(task.train), size, settings.recorded_order_seed)
    return window_ablation(
        task,
        trajectory,
        window=window,
        weight=settings.weight,
        steps=steps,
        repeats=settings.orders,
        order=order,
        progress=lambda done, total: progress("retraining windows", done, total),
    )


def exemplars(
    task: Task, store: TraceStore, influence: xr.Dataset, count: int, steps: int = 4, queries: int = 3
) -> list[Exemplar]:
    """The most helpful and most harmful training samples of the queries that change most, at a few steps.

    Samples are ranked by value / stderr, so that a large but noisy value does not lead.
    """
    if count == 0 or "query" not in influence.dims:
        return []
    chosen = spread(influence["step"].values.tolist(), steps)
    change = abs(influence["value"]).max("train").std("step")
    names = influence["query"].values[np.argsort(-change.values)][:queries].tolist()
    samples = bif(_SampleBySample(store, chosen))
    labels = task.train_groups if task.train_groups is not None else [""] * len(task.train)
    found = []
    for query in names:
        for step in chosen:
            cell = samples.sel(step=step, query=query)
            value, stderr = cell["value"].values, cell["stderr"].values
            ranked = np.argsort(np.divide(value, stderr, out=np.zeros_like(value), where=stderr > 0))
            picked = np.concatenate([ranked[:count], ranked[::-1][:count]]).tolist()
            found.append(
                Exemplar(
                    str(query),
                    step,
                    picked,
                    [str(labels[i]) for i in picked],
                    value[picked].tolist(),
                    stderr[picked].tolist(),
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


def spread(steps: Sequence[int], count: int) -> list[int]:
    """``count`` of the steps, evenly spread over their order."""
    index = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    return [steps[i] for i in index]


@torch.no_grad()
def _losses(task: Task, state: dict[str, torch.Tensor], data: Samples) -> torch.Tensor:
    """Loss of every sample, the mean over its tokens, on the CPU."""
    losses = [task.losses(state, batch) for batch in data.batches(task.forward_batch, task.device)]
    return torch.cat([loss if loss.ndim == 1 else loss.mean(1) for loss in losses]).cpu()
