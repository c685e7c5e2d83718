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
    """Exact influence, damped influence and products of gradients against retraining, and what chains can answer."""
    estimators = {"exact influence": exact, "damped": damped, "products of gradients": gradients}
    found = held(lab, estimators, "the loss on every other class", apart=True)
    sampled = [chains(lab, seed) for seed in lab.seeds]
    section = Section(found.section.title, [*found.section.parts, _table(lab, sampled)])
    return replace(found, section=section, findings=[*found.findings, _finding(lab, sampled)])


def _finding(lab: Lab, sampled: list[xr.Dataset]) -> str:
    verdicts = [verdict for one in sampled for verdict in one["verdict"].values.tolist()]
    known = words.enumeration([f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts)])
    windows = words.count(lab.settings.sampled_window, "update")
    return f"Chains were asked about windows of {windows} at {words.count(len(verdicts), 'checkpoint')}: {known}."


def _table(lab: Lab, sampled: list[xr.Dataset]) -> Table:
    """The verdict on chains at every checkpoint that was sampled."""
    rows = [
        [str(seed), str(step), str(at["verdict"].item()), *(words.score(float(at[name])) for name in _SCORES)]
        for seed, one in zip(lab.seeds, sampled, strict=True)
        for step in one["step"].values.tolist()
        for at in [one.sel(step=step)]
    ]
    windows = words.count(lab.settings.sampled_window, "update")
    columns = ["Seed", "Window from step", "Verdict on chains", "Correlation", "Slope"]
    title = (
        f"Chains in windows of {windows}, and exact influence of these held against them, pairs of different classes"
    )
    return Table(title, columns, rows, frozenset({"Verdict on chains"}))
