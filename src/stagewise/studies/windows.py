"""Does exact influence say what happens? Windows trained again with a class at another weight, in every run."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.studies import verdicts
from stagewise.studies.effects import Effects, Estimator, effects
from stagewise.studies.estimators import chains, damped, gradients
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.runs import Runs

EXACT = "exact influence"


def windows(lab: Runs[Any], exact: Estimator, queries: str, apart: bool) -> Experiment:
    """Exact influence, damped influence and products of gradients against retraining, and what chains can answer.

    Chains cost more than all the others, and are asked about the first run only.

    Args:
        lab: the runs.
        exact: exact influence where the settings' windows begin; it is held to targets.
        queries: what is influenced, in words.
        apart: only pairs of different classes.
    """
    estimators = {EXACT: exact, "damped": damped, "products of gradients": gradients}
    weights, runs = lab.settings.weights, words.count(lab.settings.seeds, "run")
    small = min(weights, key=lambda weight: abs(weight - 1))
    found = {
        (name, weight): effects(lab, estimator, weight, apart)
        for name, estimator in estimators.items()
        for weight in weights
    }
    checks = [
        check
        for (name, weight), one in found.items()
        for check in _checks(name, weight, one.scores, (name, weight) == (EXACT, small))
    ]
    best, sampled = found[EXACT, small].scores, chains(lab, lab.seeds[0], apart)
    finding = (
        f"In {words.count(len(lab.settings.window_starts), 'window')} of each of {runs} {EXACT} predicts what "
        f"a weight of {small:g} of one class does: correlation {_range(best.correlation)}, slope {_range(best.slope)}. "
        + " ".join(_told(name, found[name, small].scores) for name in estimators if name != EXACT)
    )
    caption = (
        f"What a weight of {small:g} of one class of tokens during a window of {lab.settings.window} steps does to "
        f"{queries}, in all runs: measured by training the window again, against what is predicted. On the line the "
        "size is right."
    )
    plate = Plate("windows", caption, _draw({name: found[name, small] for name in estimators}))
    section = Section(
        "Held against retraining", [plate, _table(lab, found, apart), verdicts.table(lab, sampled, apart)]
    )
    return Experiment(section, [finding, verdicts.finding(lab, sampled)], checks)


def _told(name: str, scores: xr.Dataset) -> str:
    where = int(scores.correlation.notnull().any("seed").sum())
    if not where:
        return f"{name[:1].upper()}{name[1:]}: no answer."
    some = "" if where == scores.sizes["step"] else f", where they answer ({where} of {scores.sizes['step']})"
    return (
        f"{name[:1].upper()}{name[1:]}{some}: correlation {_range(scores.correlation)}, slope {_range(scores.slope)}."
    )


def _checks(name: str, weight: float, scores: xr.Dataset, held: bool) -> list[Check]:
    """Over all seeds and windows; targets for exact influence at the smallest change, of which it is the limit."""
    least, low, high = (float(x) for x in (scores.correlation.min(), scores.slope.min(), scores.slope.max()))
    what = f"{name} vs windows trained again at weight {weight:g}, all seeds and windows:"
    if not held:
        return [
            Check.reported(f"{what} least r", least, ".3f"),
            Check.reported(f"{what} least and largest slope", [low, high], ".3f"),
        ]
    return [
        Check.at_least(f"{what} least r", least, 0.95, ".3f"),
        Check.between(f"{what} least slope", low, 0.9, 1.1, ".3f"),
        Check.between(f"{what} largest slope", high, 0.9, 1.1, ".3f"),
    ]


def _range(values: xr.DataArray) -> str:
    """Least and largest of those that there are."""
    return "–" if values.isnull().all() else f"{words.score(float(values.min()))} to {words.score(float(values.max()))}"


def _table(lab: Runs[Any], found: dict[tuple[str, float], Effects], apart: bool) -> Table:
    """Scores of every window: their range over seeds."""
    rows = [
        [str(start), f"{weight:g}", name, _range(at.correlation), _range(at.slope)]
        for start in lab.settings.window_starts
        for (name, weight), one in found.items()
        for at in [one.scores.sel(step=start)]
    ]
    columns = ["Window from step", "Weight", "Predicted by", "Correlation", "Slope"]
    pairs = ", over pairs of different classes" if apart else ""
    title = f"Agreement with retraining{pairs}: least and largest of all seeds"
    return Table(title, columns, rows, frozenset({"Predicted by"}))


@style.styled
def _draw(found: dict[str, Effects]) -> Figure:
    figure = style.canvas(4.2)
    axes = figure.subplots(1, len(found), sharex=True, sharey=True)
    largest = max(float(np.abs(values).max()) for one in found.values() for values in one[:2])
    scale, unit = style.unit(largest)
    reach = 1.05 * largest / scale
    for ax, (name, one) in zip(axes, found.items(), strict=True):
        ax.plot([-reach, reach], [-reach, reach], color=style.MUTED, linewidth=0.7, zorder=1)
        for start, colour in style.colours(one.measured["step"].values.tolist()).items():
            predicted, measured = (part.sel(step=start).values.ravel() / scale for part in one[:2])
            ax.plot(predicted, measured, ".", color=colour, markersize=4, alpha=0.7, label=f"from step {start}")
        ax.set_title(name)
        ax.set_aspect("equal")
    axes[0].legend(frameon=False, loc="upper left")
    style.name_axes(figure, f"predicted effect ({unit})", f"measured effect ({unit})")
    return figure
