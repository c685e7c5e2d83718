"""Runs in which one class of tokens has more weight for a while, and how much earlier they learn."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.studies.induction.influence import chance_classes
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.training import EXCESS

UNCHANGED, CHANCE = "unchanged", "chance"
NAME = "induction"
"""The class that has more weight."""


def boosted(lab: Lab, seed: int) -> xr.DataArray:
    """Excess of runs in which induction tokens have more weight during a window, looked at where checkpoints are.

    More weight on anything makes gradients larger. So each run has its control: in the same window, as many tokens
    at the same places of their sequences, drawn by chance. All runs share their start and their batches.

    Args:
        lab: whose runs; windows and weight are its settings'.
        seed: of the run.

    Returns:
        KL(bigram rule || network) on the queries, nats, ``(run, step)``: ``"unchanged"``, the class and ``"chance"``,
        each followed by the first step of its window.
    """
    return lab.kept("boosted", seed, lambda: _boosted(lab, seed).to_dataset(name="excess"))["excess"]


def _boosted(lab: Lab, seed: int) -> xr.DataArray:
    settings, run = lab.settings, lab.run(seed)
    schedules = {UNCHANGED: Schedule()}
    for who, labels in ((NAME, lab.data.classes), (CHANCE, chance_classes(lab, seed))):
        tokens = torch.from_numpy(np.flatnonzero(labels == NAME))
        for start in settings.boost_starts:
            schedules[f"{who} {start}"] = Schedule.window(
                tokens, start, settings.boost_length, settings.boost, labels.shape[1]
            )
    first = max(step for step in run.steps if step <= min(settings.boost_starts))
    steps = [step for step in run.steps if step >= first]
    order = BatchOrder(settings.sequences, settings.batch_size, seed)
    losses = retrain(
        lab.task(seed),
        run.load(first),
        list(schedules.values()),
        order,
        steps,
        progress=lab.told("training with more weight", seed),
    )
    named = losses.sel(query=EXCESS, drop=True).rename(replay="run").assign_coords(run=list(schedules))
    return named.transpose("run", "step")


def gained(lab: Lab, excess: xr.DataArray) -> xr.Dataset:
    """By how many updates runs with more weight reach half of what there is to learn before the unchanged run does.

    Args:
        lab: whose settings say the windows.
        excess: from :func:`boosted`.

    Returns:
        ``induction`` and ``chance`` ``(start)``, steps; NaN where a run does not get there.
    """
    half = (lab.plateau + float(excess.sel(run=UNCHANGED)[-1])) / 2
    when, starts = reached(excess, half), list(lab.settings.boost_starts)
    steps = {
        who: ("start", [float(when.sel(run=UNCHANGED) - when.sel(run=f"{who} {start}")) for start in starts])
        for who in (NAME, CHANCE)
    }
    return xr.Dataset(steps, {"start": starts})


def reached(excess: xr.DataArray, level: float) -> xr.DataArray:
    """When each run first has an excess of ``level``, interpolated between looks: ``(run)``, in steps; NaN if never.

    Args:
        excess: from :func:`boosted`; a run begins above the level.
        level: nats, e.g. half-way between the plateau and the end.
    """
    steps, values = excess["step"].values.astype(float), excess.transpose("run", "step").values

    def crossing(curve: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        below = np.flatnonzero(curve <= level)
        if not len(below) or below[0] == 0:
            return float("nan")
        after = below[0]
        return float(np.interp(-level, -curve[after - 1 : after + 1], steps[after - 1 : after + 1]))

    return xr.DataArray([crossing(curve) for curve in values], {"run": excess["run"]}, ("run",), "step")
