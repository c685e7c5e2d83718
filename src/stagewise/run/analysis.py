"""What a run computes beside its traces, checkpoint by checkpoint: losses, measured effects, influence in two times."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoint import Checkpoint, tensors_digest
from stagewise.checkpoints.batches import packed
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.evaluate import CURVATURE_SAMPLES, Point, chunks, spread_rows
from stagewise.groups import query_groups
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.losses import query_losses
from stagewise.retraining.orders import all_kinds, window_orders
from stagewise.retraining.replay import replay
from stagewise.retraining.schedule import BatchOrder, Order
from stagewise.retraining.start import start_at
from stagewise.retraining.two_times import influence_in_time
from stagewise.run.config import RunConfig
from stagewise.run.kept import Kept
from stagewise.run.progress import Progress
from stagewise.task import Task
from stagewise.usable import at_usable, none_usable
from stagewise.vector import ParameterVector

_MOST_BINS = 24  # of time, in a picture


@dataclass(frozen=True)
class Stage:
    """A kind of result, one for every checkpoint or one for the whole run.

    Attributes:
        name: of the estimator; it names its files and its progress.
        cause: what the numbers depend on beside the task and the checkpoint: settings.
        digests: the content hash of every checkpoint that it is wanted at, by step; under None for the whole run.
        compute: ``compute(steps=[step])``, or ``compute()`` for the whole run.
        sure: whether it is needed whatever other stages give.
        as_cells: whether any worker can make it again from its name; else it is computed where it is asked for.
    """

    name: str
    cause: str
    digests: Mapping[int, str] | Mapping[None, str]
    compute: Callable[..., xr.Dataset]
    sure: bool = True
    as_cells: bool = True

    def key(self, step: int | None) -> str:
        """All that the result at a step depends on beside the task."""
        return f"{self.cause} {step} {cast(dict[int | None, str], self.digests)[step]}"


@dataclass(frozen=True)
class Analysis:
    """What all results of a run depend on.

    Attributes:
        task: what is studied.
        trajectory: the checkpoints.
        config: what is asked for.
        digests: the content hash of every checkpoint that is asked for and can be used, by step.
        kept: results that are there already.
        progress: is told of every checkpoint.
        fill: computes what is not kept yet of a stage that workers can make, and tells of it.
    """

    task: Task
    trajectory: Trajectory
    config: RunConfig
    digests: Mapping[int, str]
    kept: Kept
    progress: Progress
    fill: Callable[[Stage], object] | None = None

    def of_windows(self, window: int) -> dict[int, str]:
        """The hashes, with all else that windows from a checkpoint depend on."""
        facts = {step: _window_facts(self.trajectory.load(step), window) for step in self.digests}
        return {step: f"{digest} {facts[step]}" for step, digest in self.digests.items()}

    def of_run(self) -> str:
        """What depends on all checkpoints depends on this."""
        return " ".join(_facts(checkpoint) for checkpoint in map(self.trajectory.load, self.trajectory.steps))

    def step_by_step(self, stage: Stage) -> xr.Dataset:
        """A stage at every checkpoint, along ``step``; what is kept is not computed again.

        Raises:
            ValueError: no checkpoint can be used, with the reasons.
        """
        rows, reasons = self.each(stage)
        if not rows:
            raise ValueError(none_usable(reasons))
        result = xr.concat(rows, "step", combine_attrs="override")
        if kinds := [row.attrs["batches"] for row in rows if "batches" in row.attrs]:
            result.attrs["batches"] = all_kinds(kinds)
        if any("first_order_omitted" in row.attrs for row in rows):
            named = [json.loads(row.attrs["first_order_omitted"]) for row in rows]
            result.attrs["first_order_omitted"] = json.dumps({step: why for of in named for step, why in of.items()})
            solved = [row.attrs["first_order"] for row in rows if row.attrs["first_order"] != "sampled"]
            result.attrs["first_order"] = next(iter(solved), "sampled")
        result.attrs["omitted"] = json.dumps({str(step): reason for step, reason in reasons.items()})
        return result

    def each(self, stage: Stage) -> tuple[list[xr.Dataset], dict[int, str]]:
        """A stage at every checkpoint that can be used, and why others cannot, by step."""
        rows, reasons = [], {}
        filled = self._filled(stage)
        for done, step in enumerate(cast(Mapping[int, str], stage.digests), start=1):
            try:
                rows.append(self.result(stage, step))
            except ValueError as error:
                reasons[step] = str(error)
            if not filled:
                self.progress(stage.name, done, len(stage.digests))
        return rows, reasons

    def once(self, stage: Stage) -> xr.Dataset:
        """A stage of the whole run.

        Raises:
            ValueError: it cannot be computed.
        """
        self._filled(stage)
        return self.result(stage, None)

    def result(self, stage: Stage, step: int | None) -> xr.Dataset:
        """Of one stage, at one checkpoint or of the whole run.

        Raises:
            ValueError: it cannot be computed.
        """
        compute = stage.compute if step is None else partial(stage.compute, steps=[step])
        return self.kept.get(stage.name, stage.key(step), compute)

    def _filled(self, stage: Stage) -> bool:
        """Whether workers have computed what was missing."""
        if self.fill is None or not stage.as_cells:
            return False
        self.fill(stage)
        return True


def mean_losses(task: Task, trajectory: Trajectory, steps: Sequence[int]) -> xr.Dataset:
    """Mean loss of the training set and of every query group at every checkpoint that fits the model, nats.

    Of a large training set at most 2,048 samples are looked at, evenly spaced; attribute ``train_samples`` then.
    With ``rates`` (step), the sum of the learning rates of the updates since the first of these checkpoints, where
    every update is known.
    """
    groups, rows = query_groups(task), spread_rows(CURVATURE_SAMPLES, len(task.train))

    def estimate(step: int) -> tuple[float, list[float], tuple[float, ...]]:
        checkpoint = task.fitted(trajectory.load(step))
        state, vector = checkpoint.params, ParameterVector.of(task)
        point, place = Point(task, vector, state), vector.flatten(state)
        with torch.no_grad():
            parts = [point.sample_losses(place, batch) for batch in chunks(task, task.train, rows)]
        losses, weights = (torch.cat(column).double() for column in zip(*parts, strict=True))
        mean = query_losses(point, place[None], groups, "loop")[0]
        return ((losses * weights).sum() / weights.sum()).item(), mean.tolist(), checkpoint.learning_rates

    known = at_usable(trajectory, steps, estimate)
    train, queries, rates = zip(*known.results, strict=True)
    found = xr.Dataset(
        {
            "train": ("step", list(train), {"units": "nats"}),
            "queries": (("step", "query"), list(queries), {"units": "nats"}),
        },
        {"step": known.steps, "query": list(groups.labels)},
        known.attrs | ({"train_samples": len(rows)} if len(rows) < len(task.train) else {}),
    )
    made = np.diff(known.steps, prepend=known.steps[0])
    if not all(len(ours) >= count >= 0 for ours, count in zip(rates, made, strict=True)):
        return found
    sums = [sum(ours[len(ours) - count :]) for ours, count in zip(rates, made, strict=True)]
    return found.assign(rates=("step", np.cumsum(sums), {"of": "sum of the learning rates of the updates before"}))


def two_times_stage(analysis: Analysis) -> Stage | None:
    """Influence in two times, from the first checkpoint on, asked at some of the others; None if it is not asked for.

    Raises:
        ValueError: the run's own batches are not known, or as :func:`stagewise.influence_in_time`.
    """
    task, trajectory, config = analysis.task, analysis.trajectory, analysis.config
    if not config.two_times:
        return None
    steps = sorted(analysis.digests)
    if len(steps) < 2:
        raise ValueError("two checkpoints or more are needed: one to start from, and one at which to ask")
    asked = spread(steps[1:], config.two_times)
    start, span = trajectory.load(steps[0]), asked[-1] - steps[0]
    orders = window_orders(start_at(task, start), recorded_order(task, trajectory, config), span, 1, 0)
    if not orders.known:
        raise ValueError("the run's own batches are not known: record them, recorder(step, indices)")
    edges = [step for step in steps if step <= asked[-1]]
    bins = sorted({*spread(edges, _MOST_BINS), *asked})
    name = "influence in two times"

    def compute() -> xr.Dataset:
        bar = partial(analysis.progress, name)
        first = orders.orders[0]
        return influence_in_time(task, start, first, asked, bins=bins, scratch=config.folder, progress=bar)

    return Stage(name, f"{asked} {bins} {config.retraining!r}", {None: analysis.of_run()}, compute)


def in_two_times(analysis: Analysis) -> xr.Dataset | None:
    """Influence in two times, if it is asked for; raises as :func:`two_times_stage`."""
    stage = two_times_stage(analysis)
    return None if stage is None else analysis.once(stage)


def ablation_stage(analysis: Analysis) -> Stage | None:
    """Measured window effects at every checkpoint; None if they are not asked for."""
    settings, window = analysis.config.retraining, retraining_window(analysis.config)
    if settings is None or window is None:
        return None
    ablation = partial(
        window_ablation,
        analysis.task,
        analysis.trajectory,
        window=window,
        weight=settings.weight,
        repeats=settings.repeats,
        order=recorded_order(analysis.task, analysis.trajectory, analysis.config),
    )
    return Stage("retraining windows", f"{window} {settings!r}", analysis.of_windows(window), ablation)


def replay_stage(analysis: Analysis) -> Stage | None:
    """How well retraining repeats the run; None where nothing is retrained."""
    task, trajectory, config = analysis.task, analysis.trajectory, analysis.config
    if (window := retraining_window(config)) is None:
        return None
    name, steps = "repeating the run", list(analysis.digests)

    def repeat() -> xr.Dataset:
        bar = partial(analysis.progress, name)
        return replay(task, trajectory, recorded_order(task, trajectory, config), steps, progress=bar)

    return Stage(name, f"{window} {config.retraining!r} {steps}", {None: analysis.of_run()}, repeat)


def measure(analysis: Analysis) -> dict[str, xr.Dataset]:
    """Measured window effects, if asked for, and how well retraining repeats the run that they are to prove."""
    windows, repeat = ablation_stage(analysis), replay_stage(analysis)
    if windows is None or repeat is None:
        return {}
    measured = analysis.step_by_step(windows)
    if "effect_stderr" in measured:  # where the run's own batches alone were replayed there is nothing to average over
        measured["effect_stderr"] = measured["effect_stderr"].fillna(0.0)
    return {"measured": measured, "replay": analysis.once(repeat)}


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


def spread(steps: Sequence[int], count: int) -> list[int]:
    """``count`` of the steps, evenly spread over their order."""
    index = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    return [steps[i] for i in index]


def _window_facts(checkpoint: Checkpoint, window: int) -> str:
    """What windows from a checkpoint depend on besides its digest."""
    return f"{checkpoint.changing_rates(window)}{_batches_digest(checkpoint.coming_batches[:window])}"


def _facts(checkpoint: Checkpoint) -> str:
    """What a replay that ends at a checkpoint depends on."""
    return f"{checkpoint.step} {checkpoint.digest} {checkpoint.learning_rates}{_batches_digest(checkpoint.batches)}"


def _batches_digest(batches: Sequence[Tensor]) -> str:
    return f" {tensors_digest(packed(batches))}" if batches else ""
