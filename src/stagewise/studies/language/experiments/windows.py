"""Does exact influence say what happens, and what do estimators say that look at the checkpoint alone?"""

from __future__ import annotations

from dataclasses import replace

import xarray as xr

from stagewise.reporting import words
from stagewise.reporting.page import Section
from stagewise.reporting.tables import Table
from stagewise.studies.experiment import Experiment
from stagewise.studies.language.influence import chains, damped, exact, gradients
from stagewise.studies.language.lab import Lab
from stagewise.studies.windows import windows as held

_SCORES = ("correlation", "slope")


def windows(lab: Lab) -> Experiment:
    """Exact influence, damped influence and products of gradients against retraining, and what chains can answer.

    Chains cost more than all the others, and are asked about the first run only.
    """
    estimators = {"exact influence": exact, "damped": damped, "products of gradients": gradients}
    found, sampled = held(lab, estimators, "the loss on every other class", apart=True), chains(lab, lab.seeds[0])
    section = Section(found.section.title, [*found.section.parts, _table(lab, sampled)])
    return replace(found, section=section, findings=[*found.findings, _finding(lab, sampled)])


def _finding(lab: Lab, sampled: xr.Dataset) -> str:
    verdicts = sampled["verdict"].values.tolist()
    known = words.enumeration([f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts)])
    checkpoints = words.count(len(verdicts), "checkpoint")
    return f"Chains were asked about windows of {_updates(lab)} at {checkpoints} of the first run: {known}."


def _table(lab: Lab, sampled: xr.Dataset) -> Table:
    """The verdict on chains at every checkpoint that was sampled."""
    rows = [
        [
            str(step),
            str(at["verdict"].item()),
            *(words.score(float(at[name])) for name in _SCORES),
            str(at["advice"].item()),
        ]
        for step in sampled["step"].values.tolist()
        for at in [sampled.sel(step=step)]
    ]
    columns = ["Window from step", "Verdict on chains", "Correlation", "Slope", "Advice"]
    title = f"Chains in windows of {_updates(lab)}, and exact influence of these on theirs, pairs of different classes"
    return Table(title, columns, rows, frozenset({"Verdict on chains", "Advice"}))


def _updates(lab: Lab) -> str:
    return words.count(lab.settings.sampled_window, "update")
