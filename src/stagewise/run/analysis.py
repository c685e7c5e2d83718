"""What a run computes beside its traces: losses, estimators without chains, measured effects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoint import Checkpoint, tensors_digest
from stagewise.checkpoints.batches import packed
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.evaluate import Point, chunks
from stagewise.groups import query_groups
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.results import DAMPED, EXACT
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.losses import query_losses
from stagewise.retraining.orders import all_kinds, window_orders
from stagewise.retraining.replay import replay
from stagewise.retraining.schedule import BatchOrder, Order
from stagewise.retraining.start import start_at
from stagewise.retraining.two_times import influence_in_time
from stagewise.retraining.window_influence import window_influence
from stagewise.run.config import RunConfig
from stagewise.run.kept import Kept
from stagewise.run.progress import Progress
from stagewise.task import Task
from stagewise.usable import at_usable, none_usable
from stagewise.vector import ParameterVector

_MOST_BINS = 24  # of time, in a picture

SAMPLED = "bif"
"""The estimator that needs chains, as a configuration calls it."""

NAMES = {"exact": EXACT, "damped": DAMPED, "gradient": "gradient product"}
"""What the estimators without chains are called in a report, by their name in a configuration."""


def estimate(name: str, task: Task, trajectory: Trajectory, config: RunConfig) -> Callable[..., xr.Dataset]:
    """An estimator without chains, as a function of ``steps``.

    Raises:
        ValueError: the exact influence is asked for, and no window is given.
    """
    if name != "exact":
        return partial(
            {"damped": damped_influence, "gradient": gradient_product}[name], task, trajectory, config.posterior
        )
    if config.posterior.window is None:
        raise ValueError("it is that of a window of training: set posterior.window instead of gamma")
    order = recorded_order(task, trajectory, config)
    asked = config.retraining.repeats if config.retraining else None
    return partial(
        window_influence,
        task,
        trajectory,
        window=config.posterior.window,
        per="sample" if task.train_groups is None else "group",
        repeats=None if asked == 1 else asked,  # one order that is not the run's own would have no error
        order=order,
    )


def mean_losses(task: Task, trajectory: Trajectory, steps: Sequence[int]) -> xr.Dataset:
    """Mean loss of the training set and of every query group at every checkpoint that fits the model, nats."""
    groups = query_groups(task)

    def estimate(step: int) -> tuple[float, list[float]]:
        state, vector = task.fitted(trajectory.load(step)).params, ParameterVector.of(task)
        point, place = Point(task, vector, state), vector.flatten(state)
        with torch.no_grad():
            parts = [point.sample_losses(place, batch) for batch in chunks(task, task.train)]
        losses, weights = (torch.cat(column).double() for column in zip(*parts, strict=True))
        mean = query_losses(point, place[None], groups, "loop")[0]
        return ((losses * weights).sum() / weights.sum()).item(), mean.tolist()

    known = at_usable(trajectory, steps, estimate)
    return xr.Dataset(
        {
            "train": ("step", [train for train, _ in known.results], {"units": "nats"}),
            "queries": (("step", "query"), [queries for _, queries in known.results], {"units": "nats"}),
        },
        {"step": known.steps, "query": list(groups.labels)},
        known.attrs,
    )


def baselines(
    task: Task,
    trajectory: Trajectory,
    config: RunConfig,
    digests: Mapping[int, str],
    kept: Kept,
    progress: Progress,
) -> tuple[dict[str, xr.Dataset], dict[str, str]]:
    """The deterministic estimators of the same influence, by name; and why one is left out.

    ``digests`` are the content hashes of the checkpoints that are asked for, by step.
    """
    results: dict[str, xr.Dataset] = {}
    left_out: dict[str, str] = {}
    for name in (name for name in config.estimators if name in NAMES):
        cause, seen = "", digests
        if name == "exact":
            cause = f"{config.posterior.window} {config.retraining!r}"
            seen = _of_windows(digests, trajectory, config.posterior.window or 0)
        try:
            found = estimate(name, task, trajectory, config)
            results[NAMES[name]] = _step_by_step(NAMES[name], cause, found, seen, kept, progress)
        except ValueError as error:
            left_out[NAMES[name]] = str(error)
    return results, left_out


def in_two_times(
    task: Task,
    trajectory: Trajectory,
    config: RunConfig,
    digests: Mapping[int, str],
    kept: Kept,
    progress: Progress,
) -> xr.Dataset:
    """Influence in two times, from the first checkpoint on, asked at some of the others.

    Raises:
        ValueError: the run's own batches are not known, or as :func:`stagewise.influence_in_time`.
    """
    steps = sorted(digests)
    if len(steps) < 2:
        raise ValueError("two checkpoints or more are needed: one to start from, and one at which to ask")
    asked = spread(steps[1:], config.two_times)
    start, span = trajectory.load(steps[0]), asked[-1] - steps[0]
    orders = window_orders(start_at(task, start), recorded_order(task, trajectory, config), span, 1, 0)
    if not orders.known:
        raise ValueError("the run's own batches are not known: record them, recorder(step, indices)")
    edges = [step for step in steps if step <= asked[-1]]
    bins = sorted({*spread(edges, _MOST_BINS), *asked})

    def compute() -> xr.Dataset:
        bar = partial(progress, "influence in two times")
        return influence_in_time(task, start, orders.orders[0], asked, bins=bins, progress=bar)

    run = " ".join(_facts(checkpoint) for checkpoint in map(trajectory.load, trajectory.steps))
    return kept.get("influence in two times", f"{asked} {bins} {config.retraining!r} {run}", compute)


def measure(
    task: Task,
    trajectory: Trajectory,
    config: RunConfig,
    digests: Mapping[int, str],
    kept: Kept,
    progress: Progress,
) -> dict[str, xr.Dataset]:
    """Measured window effects, if asked for, and how well retraining repeats the run that they are to prove."""
    settings, window = config.retraining, retraining_window(config)
    if settings is None or window is None:
        return {}
    order = recorded_order(task, trajectory, config)
    ablation = partial(
        window_ablation,
        task,
        trajectory,
        window=window,
        weight=settings.weight,
        repeats=settings.repeats,
        order=order,
    )
    cause = f"{window} {settings!r}"
    digests = _of_windows(digests, trajectory, window)
    measured = _step_by_step("retraining windows", cause, ablation, digests, kept, progress)
    if "effect_stderr" in measured:  # where the run's own batches alone were replayed there is nothing to average over
        measured["effect_stderr"] = measured["effect_stderr"].fillna(0.0)

    def repeat() -> xr.Dataset:
        bar = partial(progress, "repeating the run")
        return replay(task, trajectory, order, list(digests), progress=bar)

    run = " ".join(_facts(checkpoint) for checkpoint in map(trajectory.load, trajectory.steps))
    return {"measured": measured, "replay": kept.get("replay", f"{cause} {list(digests)} {run}", repeat)}


def _of_windows(digests: Mapping[int, str], trajectory: Trajectory, window: int) -> dict[int, str]:
    """The hashes, with all else that windows from a checkpoint depend on."""
    return {step: f"{digest} {_window_facts(trajectory.load(step), window)}" for step, digest in digests.items()}


def _window_facts(checkpoint: Checkpoint, window: int) -> str:
    """What windows from a checkpoint depend on besides its digest."""
    return f"{checkpoint.changing_rates(window)}{_batches_digest(checkpoint.coming_batches[:window])}"


def _facts(checkpoint: Checkpoint) -> str:
    """What a replay that ends at a checkpoint depends on."""
    return f"{checkpoint.step} {checkpoint.digest} {checkpoint.learning_rates}{_batches_digest(checkpoint.batches)}"


def _batches_digest(batches: Sequence[Tensor]) -> str:
    return f" {tensors_digest(packed(batches))}" if batches else ""


def _step_by_step(
    name: str,
    cause: str,
    estimate: Callable[..., xr.Dataset],
    digests: Mapping[int, str],
    kept: Kept,
    progress: Progress,
) -> xr.Dataset:
    """``estimate(steps=[step])`` of every checkpoint, along ``step``; what is kept is not computed again.

    Raises:
        ValueError: no checkpoint can be used, with the reasons.
    """
    rows, reasons = [], {}
    for done, (step, digest) in enumerate(digests.items(), start=1):
        try:
            rows.append(kept.get(name, f"{cause} {step} {digest}", partial(estimate, steps=[step])))
        except ValueError as error:
            reasons[step] = str(error)
        progress(name, done, len(digests))
    if not rows:
        raise ValueError(none_usable(reasons))
    result = xr.concat(rows, "step", combine_attrs="override")
    if kinds := [row.attrs["batches"] for row in rows if "batches" in row.attrs]:
        result.attrs["batches"] = all_kinds(kinds)
    result.attrs["omitted"] = json.dumps({str(step): reason for step, reason in reasons.items()})
    return result


def retraining_window(config: RunConfig) -> int | None:
    """Length of the windows that are retrained; None where nothing is.

    Raises:
        ValueError: retraining is asked for without a window.
    """
    if config.retraining is None:
        return None
    window = config.retraining.window or config.posterior.window
    if window is None:
        raise ValueError("retraining needs a window: set retraining.window, or posterior.window instead of gamma")
    return window


def recorded_order(task: Task, trajectory: Trajectory, config: RunConfig) -> Order | None:
    """The run's own batches, if the configuration knows their seed."""
    settings = config.retraining
    if settings is None or settings.recorded_order_seed is None:
        return None
    sizes = (trajectory.load(step).optimizer for step in trajectory.steps)
    size = next((optimizer.batch_size for optimizer in sizes if optimizer and optimizer.batch_size is not None), 0)
    return BatchOrder(len(task.train), size, settings.recorded_order_seed)


def exact_samples(
    task: Task,
    trajectory: Trajectory,
    config: RunConfig,
    digests: Mapping[int, str],
    kept: Kept,
    progress: Progress,
    steps: list[int],
    queries: list[Any],
) -> xr.Dataset:
    """From the replayed window."""
    of_samples = partial(estimate("exact", _asked(task, queries), trajectory, config), per="sample")
    cause = f"{config.posterior.window} {config.retraining!r} {queries}"
    seen = _of_windows({step: digests[step] for step in steps}, trajectory, config.posterior.window or 0)
    return _step_by_step("exact influence of samples", cause, of_samples, seen, kept, progress)


def exact_tokens(
    task: Task,
    trajectory: Trajectory,
    config: RunConfig,
    digests: Mapping[int, str],
    kept: Kept,
    progress: Progress,
    picked: Mapping[int, Sequence[int]],
    queries: list[Any],
) -> dict[int, xr.Dataset]:
    """Influence of every token of the samples that were picked at each step: the same window, replayed once more.

    Nothing is held of the tokens of all the others, of which there may be too many.
    """
    found, name = dict[int, xr.Dataset](), "exact influence of tokens"
    seen = _of_windows({step: digests[step] for step in picked}, trajectory, config.posterior.window or 0)
    for done, (step, digest) in enumerate(seen.items(), start=1):
        few = _asked(task, queries)
        few.candidates = torch.tensor(sorted(picked[step]))
        compute = partial(estimate("exact", few, trajectory, config), per="token", steps=[step])
        cause = f"{config.posterior.window} {config.retraining!r} {queries} {few.candidates.tolist()} {step} {digest}"
        found[step] = kept.get(name, cause, compute)
        progress(name, done, len(seen))
    return found


def _asked(task: Task, queries: Sequence[Any]) -> Task:
    """The same task with some of its query groups: each of them costs products of its own."""
    few = copy(task)
    few.grouped_queries = query_groups(task).named([str(query) for query in queries])
    return few


def spread(steps: Sequence[int], count: int) -> list[int]:
    """``count`` of the steps, evenly spread over their order."""
    index = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    return [steps[i] for i in index]
