"""Does more weight on the tokens that induction is about bring it forward, and when does it have to come?"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.studies.induction.classes import shuffled
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.training import EXCESS

UNCHANGED = "unchanged"


def boosting(lab: Lab, seed: int = 0, name: str = "induction") -> xr.DataArray:
    """Excess of runs in which one class of tokens has more weight during a window, looked at where checkpoints are.

    More weight on anything makes gradients larger. So each run has its control: in the same window, as many tokens
    at the same places of their sequences, drawn by chance. All runs share their start and their batches.

    Args:
        lab: whose runs; windows and weight are its settings'.
        seed: of the run.
        name: of the class.

    Returns:
        KL(bigram rule || network) on the queries, nats, ``(run, step)``: ``"unchanged"``, the class and ``"chance"``,
        each followed by the first step of its window.
    """
    settings, task, run = lab.settings, lab.task(seed), lab.run(seed)
    classes = lab.data.classes
    changed = {name: classes, "chance": shuffled(classes, np.random.default_rng(seed))}
    schedules = {UNCHANGED: Schedule()}
    for who, labels in changed.items():
        tokens = torch.from_numpy(np.flatnonzero(labels == name))
        for start in settings.boost_starts:
            schedules[f"{who} {start}"] = Schedule.window(
                tokens, start, settings.boost_length, settings.boost, classes.shape[1]
            )
    first = min(settings.boost_starts)
    steps = [step for step in run.steps if step >= first]
    order = BatchOrder(settings.sequences, settings.batch_size, seed)
    losses = retrain(task, run.load(first), list(schedules.values()), order, steps)
    named = losses.sel(query=EXCESS, drop=True).rename(replay="run").assign_coords(run=list(schedules))
    return named.transpose("run", "step")


def reached(excess: xr.DataArray, level: float) -> xr.DataArray:
    """When each run first has an excess of ``level``, interpolated between looks: ``(run)``, in steps; NaN if never.

    Args:
        excess: from :func:`boosting`; a run begins above the level.
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
