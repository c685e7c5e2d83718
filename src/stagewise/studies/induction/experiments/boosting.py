"""Does more weight on the tokens that induction is about bring it forward, and when does it have to come?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.dynamics.stages import Transition
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.induction import drawing
from stagewise.studies.induction.boosted import CHANCE, NAME, UNCHANGED, boosted, gained
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.seeds import t_interval

_COLOURS = {NAME: drawing.CLASS_COLOURS[NAME], CHANCE: style.MUTED}


def boosting(lab: Lab) -> Experiment:
    """Steps gained by more weight on induction tokens and on as many drawn by chance, in all runs."""
    found = [boosted(lab, seed) for seed in lab.seeds]
    steps = xr.concat([gained(lab, one) for one in found], "seed")
    steps = steps.assign(beyond=steps[NAME] - steps[CHANCE])
    transitions = [lab.transition(seed) for seed in lab.seeds]
    checks, told = [], []
    for start in lab.settings.boost_starts:
        where = _where(start, start + lab.settings.boost_length, transitions)
        for name, text in ((NAME, "induction tokens"), (CHANCE, "chance tokens"), ("beyond", "induction − chance")):
            mean, lower, upper = t_interval(steps[name].sel(start=start))
            what = f"steps gained, weight {lab.settings.boost:g} from step {start} ({where}): {text}, mean over seeds"
            checks.append(Check.reported(what, mean, ".1f", lower=lower, upper=upper))
        told.append(f"{checks[-1].text} from step {start} on ({where})")
    finding = (
        f"Weight {lab.settings.boost:g} on induction tokens for {lab.settings.boost_length} steps brings half of what "
        "there is to learn forward by so many steps more than the same weight on as many tokens drawn by chance (mean "
        f"over {words.count(lab.settings.seeds, 'run')}, 95 % interval): {'; '.join(told)}."
    )
    caption = (
        f"Left: the excess of the first run, unchanged (black) and with weight {lab.settings.boost:g} on induction "
        f"tokens for {lab.settings.boost_length} steps (blue) or on as many tokens at the same places drawn by chance "
        "(grey). The line is half-way between what the unigram rule leaves and the end: where the unchanged run is "
        "there, steps gained are counted from. Right: steps gained by when the weight began; small dots are seeds, "
        "bars 95 % t-intervals of their mean. Shaded: the transition (left: of the first run; right: the mean of all)."
    )
    plate = Plate("boosting", caption, _draw(lab, found[0], steps, transitions))
    return Experiment(Section("Bringing it forward", [plate]), [finding], checks)


def _where(start: int, end: int, transitions: Sequence[Transition | None]) -> str:
    """Where a window lies in most runs: it is in a transition if it holds its half."""
    there = [t for t in transitions if t is not None]
    sides = ["before" if end <= t.detail["half"] else "after" if start >= t.detail["half"] else "in" for t in there]
    most = max(("before", "in", "after"), key=sides.count)
    return f"{most} the transition in {sides.count(most)} of {len(transitions)}" if there else "no transition"


@style.styled
def _draw(lab: Lab, first: xr.DataArray, steps: xr.Dataset, transitions: Sequence[Transition | None]) -> Figure:
    figure = style.canvas(3.6)
    left, right = figure.subplots(1, 2)
    _curves(left, lab, first)
    drawing.mark(left, transitions[0])
    starts, shift = steps["start"].values, 0.01 * lab.settings.last
    for name, side in ((NAME, -1), (CHANCE, 1)):
        means, lower, upper = np.transpose([t_interval(steps[name].sel(start=start)) for start in starts])
        places, reach = starts + side * shift, np.nan_to_num([means - lower, upper - means])
        right.errorbar(places, means, reach, fmt="o", color=_COLOURS[name], markersize=4, capsize=2, label=name)
        right.plot(places, steps[name].transpose("start", "seed"), ".", color=_COLOURS[name], markersize=2.5)
    right.axhline(0, color="#9a9a9a", linewidth=0.7)
    if there := [t for t in transitions if t is not None]:
        ends = (float(np.mean([getattr(t, end) for t in there])) for end in ("lower", "upper"))
        right.axvspan(*ends, color=drawing.BAND, alpha=0.13, linewidth=0)
    right.set_xticks(starts)
    right.set_xlabel("first step of the window")
    right.set_title("steps gained")
    right.legend(frameon=False)
    return figure


def _curves(ax: Axes, lab: Lab, excess: xr.DataArray) -> None:
    for run in excess["run"].values.tolist():
        curve = excess.sel(run=run)
        colour = style.INK if run == UNCHANGED else _COLOURS[run.split()[0]]
        ax.plot(curve["step"], curve, color=colour, linewidth=1.4 if run == UNCHANGED else 0.9)
    half = (lab.plateau + float(excess.sel(run=UNCHANGED)[-1])) / 2
    ax.axhline(half, color=style.MUTED, linewidth=0.7, linestyle="--")
    ax.set_xlabel(drawing.STEPS)
    ax.set_title("excess of the first run (nats)")
