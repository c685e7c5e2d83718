"""What a cell will cost at one checkpoint: the sampler is tuned as in the run, and a few of its steps are timed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.sampling.block import move_apart
from stagewise.sampling.chains import Chains
from stagewise.sampling.drawing import Drawing
from stagewise.sampling.posterior import LocalDensity, LocalPosterior, largest_window
from stagewise.sampling.tuning import Tuning, tune
from stagewise.sampling.watch import DRAWN, Seen
from stagewise.task import Task
from stagewise.traces.store import Cell, TraceStore

_WARM, _STEPS = 1, 3  # steps of chains before and while the clock runs; as many draws again


@dataclass(frozen=True)
class Probe:
    """A cell at one checkpoint.

    Attributes:
        step: the checkpoint.
        seconds: of tuning and all draws, predicted.
        steps: of the sampler; 0 where nothing can be drawn.
        longest: window that the checkpoint has a posterior for; None where that was not looked at.
        seen: a few draws; None where nothing can be drawn.
    """

    step: int
    seconds: float
    steps: int
    longest: int | None
    seen: dict[str, Seen] | None


def probe(task: Task, trajectory: Trajectory, posterior: LocalPosterior, sampling: Chains, step: int) -> Probe:
    """Tune the sampler as the run will, and time a few steps and draws.

    Raises:
        ValueError: the task, the checkpoint or the posterior cannot be used.
    """
    start = perf_counter()
    density = posterior.at(task, trajectory.load(step))
    tuning = tune(density, sampling)
    seconds, longest = perf_counter() - start, _longest(tuning, density, sampling)
    if tuning.refused or (tuning.localised is False and posterior.require_localised):
        return Probe(step, seconds, 0, longest, None)
    count = tuning.burn_in + sampling.looks[-1] * tuning.thinning
    fixed, each, draw, seen = _times(tuning, sampling)
    return Probe(step, seconds + fixed + count * each + sampling.looks[-1] * draw, count, longest, seen)


def _longest(tuning: Tuning, density: LocalDensity, sampling: Chains) -> int | None:
    optimizer, curvature = density.optimizer, tuning.curvature
    if density.posterior.window is None or curvature is None or sampling.sampler == "window":
        return None
    return largest_window(curvature.smallest, optimizer, density.checkpoint.coming_rates) if optimizer else 0


def _times(tuning: Tuning, sampling: Chains) -> tuple[float, float, float, dict[str, Seen]]:
    """Seconds of a block's start, of one step and of one draw, and what was seen.

    Chains of a large model move one by one: one of them is timed, and the others are not held.
    """
    apart = tuning.batching != "stacked" and move_apart(sampling.chains, tuning.density.vector.size)
    chains = 1 if apart else sampling.chains
    brief = replace(tuning, burn_in=_WARM + _STEPS, thinning=1)
    start = perf_counter()
    drawing = Drawing(brief, replace(sampling, chains=chains, draws=_STEPS), 0)
    fixed, times = perf_counter() - start, []
    for _ in range(_WARM + 2 * _STEPS):
        start = perf_counter()
        drawing.step()
        times.append(perf_counter() - start)
    step = median(times[_WARM : _WARM + _STEPS])
    draw, share = max(median(times[_WARM + _STEPS :]) - step, 0.0), 1.0
    if apart and tuning.batch_size and sampling.control_variate:  # the checkpoint's gradient serves all chains
        share = (1 + 1 / sampling.chains) / 2
    times_more = sampling.chains / chains
    return fixed, times_more * share * step, times_more * draw, drawing.traces()


def filled(seen: dict[str, Seen], sampling: Chains, task: Task) -> xr.DataTree:
    """A cell of the right size: a few draws again and again, with noise, as no two draws are alike."""
    random, numbers = np.random.default_rng(0), np.arange(sampling.chains)
    tree = {"chains": xr.Dataset({"status": ("chain", np.full(len(numbers), "ok"))}, {"chain": numbers})}
    for name, of_set in seen.items():
        dims, variables = ("sample", "token")[: of_set.loss_anchor.ndim], {}
        for key, value in ((key, value.numpy()) for key, value in of_set._asdict().items() if value is not None):
            if key in DRAWN:
                anchor = of_set.loss_anchor.numpy()
                change = np.resize(value - anchor, (sampling.chains, sampling.looks[-1], *anchor.shape))
                value = anchor + change * random.uniform(0.5, 1.5, change.shape)
            variables[key] = ((*(("chain", "draw") if key in DRAWN else ()), *dims), value)
        coords = {"chain": numbers} | ({"sample": task.candidates.numpy()} if name == "train" else {})
        tree[name] = xr.Dataset(variables, coords)
    filled = xr.DataTree.from_dict(tree)
    filled.attrs = {"n_beta": 1.0, "localised": True}
    return filled


def written(tree: xr.DataTree) -> tuple[float, float]:
    """Seconds and bytes of a cell's file."""
    with tempfile.TemporaryDirectory() as folder:
        store = TraceStore.open(folder, {"made": "up"})
        start, cell = perf_counter(), Cell(0, 0, "made up")
        store.write(cell, tree)
        return perf_counter() - start, float((Path(folder) / "cells" / cell.name).stat().st_size)
