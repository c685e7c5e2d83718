"""Whether chains can answer windows of the first run, and what exact influence says of their answers."""

from __future__ import annotations

from typing import Any

import xarray as xr

from stagewise.reporting import words
from stagewise.reporting.tables import Table
from stagewise.studies.effects import SCORES
from stagewise.studies.runs import Runs


def finding(lab: Runs[Any], sampled: xr.Dataset) -> str:
    """How many checkpoints have which verdict.

    Args:
        lab: the runs.
        sampled: what :func:`stagewise.studies.estimators.chains` found.
    """
    verdicts = sampled["verdict"].values.tolist()
    known = words.enumeration([f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts)])
    checkpoints = words.count(len(verdicts), "checkpoint")
    return f"Chains were asked about windows of {_updates(lab)} at {checkpoints} of the first run: {known}."


def table(lab: Runs[Any], sampled: xr.Dataset, apart: bool) -> Table:
    """The verdict on chains at every checkpoint that was sampled.

    Args:
        lab: the runs.
        sampled: what :func:`stagewise.studies.estimators.chains` found.
        apart: it is of pairs of different classes only.
    """
    rows = [
        [
            str(step),
            str(at["verdict"].item()),
            *(words.score(float(at[name])) for name in SCORES),
            str(at["advice"].item()),
        ]
        for step in sampled["step"].values.tolist()
        for at in [sampled.sel(step=step)]
    ]
    columns = ["Window from step", "Verdict on chains", "Correlation", "Slope", "Advice"]
    pairs = ", pairs of different classes" if apart else ""
    title = f"Chains in windows of {_updates(lab)}, and exact influence of these on theirs{pairs}"
    return Table(title, columns, rows, frozenset({"Verdict on chains", "Advice"}))


def _updates(lab: Runs[Any]) -> str:
    return words.count(lab.settings.sampled_window, "update")
