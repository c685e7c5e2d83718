"""Does exact influence say what happens? Windows trained again with a class at another weight, in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.induction.influence import exact, gradients, trained_again
from stagewise.studies.induction.lab import Lab

_ESTIMATORS: dict[str, Callable[[Lab, int], xr.Dataset]] = {
    "exact influence": exact,
    "products of gradients": gradients,
}


class _Effects(NamedTuple):
    """Effects ``(seed, step, train, query)``, nats, and how they agree ``(seed, step)``."""

    predicted: xr.DataArray
    measured: xr.DataArray
    scores: xr.Dataset


def windows(lab: Lab) -> Experiment:
    """Exact influence and products of gradients against retraining, where the settings' windows begin."""
    weights, runs = lab.settings.weights, words.count(lab.settings.seeds, "run")
    small = min(weights, key=lambda weight: abs(weight - 1))
    found = {(name, weight): _effects(lab, name, weight) for name in _ESTIMATORS for weight in weights}
    checks = [check for (name, weight), one in found.items() for check in _checks(name, weight, one.scores, small)]
    best, other = (found[name, small].scores for name in _ESTIMATORS)
    finding = (
        f"In {words.count(len(lab.settings.window_starts), 'window')} of each of {runs} exact influence predicts what "
        f"a weight of {small:g} of one class does: correlation {_range(best.correlation)}, slope {_range(best.slope)}. "
        f"Products of gradients: correlation {_range(other.correlation)}, slope {_range(other.slope)}."
    )
    caption = (
        f"What a weight of {small:g} of one class of tokens during a window of {lab.settings.window} steps does to the "
        "excess and to the loss on every class, in all runs: measured by training the window again, against what is "
        "predicted. On the line the size is right."
    )
    plate = Plate("windows", caption, _draw({name: found[name, small] for name in _ESTIMATORS}))
    return Experiment(Section("Held against retraining", [plate, _table(lab, found)]), [finding], checks)


def _effects(lab: Lab, name: str, weight: float) -> _Effects:
    predicted, measured, scores = [], [], []
    for seed in lab.seeds:
        measured.append(trained_again(lab, seed)["effect"].sel(weight=weight, drop=True))
        predicted.append(
            predicted_effect(_ESTIMATORS[name](lab, seed), weight)["effect"].sel(step=measured[-1]["step"])
        )
        scores.append(agreement(predicted[-1], measured[-1]))
    return _Effects(xr.concat(predicted, "seed"), xr.concat(measured, "seed"), xr.concat(scores, "seed"))


def _checks(name: str, weight: float, scores: xr.Dataset, small: float) -> list[Check]:
    """Over all seeds and windows; targets for exact influence at the smallest change, of which it is the limit."""
    least, low, high = (float(x) for x in (scores.correlation.min(), scores.slope.min(), scores.slope.max()))
    what = f"{name} vs windows trained again at weight {weight:g}, all seeds and windows:"
    if name != next(iter(_ESTIMATORS)) or weight != small:
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
    return f"{words.score(float(values.min()))} to {words.score(float(values.max()))}"


def _table(lab: Lab, found: dict[tuple[str, float], _Effects]) -> Table:
    """Scores of every window: their range over seeds."""
    rows = [
        [str(start), f"{weight:g}", name, _range(at.correlation), _range(at.slope)]
        for start in lab.settings.window_starts
        for (name, weight), one in found.items()
        for at in [one.scores.sel(step=start)]
    ]
    columns = ["Window from step", "Weight", "Predicted by", "Correlation", "Slope"]
    return Table("Agreement with retraining: least and largest over seeds", columns, rows, frozenset({"Predicted by"}))


@style.styled
def _draw(found: dict[str, _Effects]) -> Figure:
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
