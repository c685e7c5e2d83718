"""Does attribution of a stage of training beat attribution at its end? Judged by retraining on every half of the items.

The run starts from random weights. A run on a subset of the items has a closed form, so that the linear datamodelling
score of any estimator is known at every time of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.retraining.lds import lds
from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import Schedule
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.hierarchy import drawing, estimators, resemblance
from stagewise.studies.hierarchy.lab import Lab, correlation
from stagewise.studies.hierarchy.network import Run
from stagewise.studies.hierarchy.settings import RATE
from stagewise.studies.hierarchy.theory.removal import subset_losses
from stagewise.studies.hierarchy.theory.tree import Floats

AT_THE_END = ("leave-one-out", "damped", "BIF, sampled")
_KINDS = {"whole run": "of the run so far", "moment": "of the moment", "end": "of the end of training"}
_COLOURS = {
    "leave-one-out": style.INK,
    "first order": "#46a2d0",
    "unrolling": "#2a35b0",
    "SOURCE": "#2eb245",
    "TracIn": "#cc7a29",
    "BIF, sampled": "#cc4788",
    "gradient product": "#666619",
    "damped": "#6677d8",
}

Scores = dict[tuple[str, str], xr.Dataset]
"""By kind and name of the estimator."""


def attribution(lab: Lab) -> Experiment:
    """Scores of all estimators over training, and how much of the end of training there is in earlier influence."""
    times = np.array(lab.settings.attribution_times)
    steps = [round(time / RATE) for time in times]
    run = estimators.recorded(lab, steps)
    so_far, moment = estimators.whole_run(lab, run, steps), estimators.moment(lab, run, steps)
    end = estimators.endpoint({name: (so_far | moment)[name] for name in AT_THE_END}, steps)
    halves = list(combinations(range(len(lab.items.names)), len(lab.items.names) // 2))
    losses, kept = truth(lab, run, halves, steps)
    scores = {
        (kind, name): datamodelling_score(estimate, losses, kept)
        for kind, estimates in zip(_KINDS, (so_far, moment, end), strict=True)
        for name, estimate in estimates.items()
    }
    untrusted = [not there for there in estimators.localised(run, steps)]
    agreement = agreement_with_retraining(run, halves, losses)

    starts = resemblance.over_starts(lab, times)
    here = resemblance.exact_influence(lab, 0, times)
    when = "t = " + ", ".join(f"{time:g}" for time in times)
    checks = [
        Check.at_least("losses of subsets, closed form vs retraining, random start: least r", agreement, 0.99, ".5f"),
        *(
            Check.reported(f"LDS {_KINDS[kind]}, {name}, at {when}", result["lds"], ".2f")
            for (kind, name), result in scores.items()
        ),
        *_resemblance_checks(lab, here, starts, f"with that at t = {times[-1]:g}, off-diagonal", when),
    ]
    exact, derivative = (float(scores["whole run", name]["lds"][-1]) for name in ("leave-one-out", "first order"))
    findings = [
        _stage_against_end(scores, times),
        f"For halves of the items at the end of training, exact leave-one-out has an LDS of {words.score(exact)}, the "
        f"exact derivative of the run {words.score(derivative)}: what is between them is beyond first order.",
    ]
    caption = (
        "Which estimator orders runs on all halves of the items by their losses, when? LDS: rank correlation of "
        "predicted and exact losses, mean over items, with 95% bootstrap intervals; random start. Estimates of all "
        "training so far, at the moment, and at the end of training but used for all times. 'Damped' has the damping "
        "that stands for the training so far, and is hollow where negative curvature outweighs it. Bottom right: rank "
        "correlation of exact leave-one-out influence with that at the end, different items; band: bootstrap over "
        "items, thin: other random starts."
    )
    plate = Plate("attribution", caption, _draw(lab, times, scores, untrusted))
    section = Section("Attribution by stage and at the end", [plate, _table(scores, times, untrusted)])
    middle = np.median(starts, 0)
    claim = Claim(
        "One attribution, at the end of training, says which data mattered",
        "Not for what was learnt earlier: exact influence has a rank correlation with that at the end of "
        + ", ".join(f"{words.score(r)} (t = {time:g})" for r, time in zip(middle[:-1], times, strict=False))
        + f", medians of {len(starts)} random starts; at t = {times[0]:g} it ranges from "
        f"{words.score(starts[:, 0].min())} to {words.score(starts[:, 0].max())}.",
    )
    return Experiment(section, findings, checks, [claim])


def _resemblance_checks(lab: Lab, here: Floats, starts: Floats, what: str, when: str) -> list[Check]:
    """Of one start, with intervals over items; and of all starts, with their range."""
    likeness, one = f"Spearman of exact influence {what}", resemblance.resemblance(here)
    lower, upper = resemblance.over_items(here, lab.settings.resamples)
    middle, least, most = np.median(starts, 0), starts.min(0), starts.max(0)
    every = f"{likeness}, median [range] of {len(starts)} starts, at {when}"
    return [
        Check.reported(f"{likeness}, at {when}", one, ".2f", lower=lower, upper=upper),
        Check.reported(every, middle, ".2f", lower=least, upper=most),
    ]


def _stage_against_end(scores: Scores, times: Floats) -> str:
    moment, end = scores["moment", "BIF, sampled"], scores["end", "BIF, sampled"]
    compared = [
        f"{_cell(moment, k)} against {_cell(end, k)} at t = {times[k]:g}"
        for k in sorted({0, len(times) // 2, len(times) - 2})
    ]
    return (
        "How well does sampled influence order runs on halves of the items by their losses (LDS, one start)? Sampled "
        f"at the same time against sampled at the end of training: {'; '.join(compared)}."
    )


def truth(
    lab: Lab, run: Run, subsets: Sequence[Sequence[int]], steps: Sequence[int]
) -> tuple[xr.DataArray, xr.DataArray]:
    """Losses of all items after training on each subset (step, replay, query), and what it has kept (replay, train)."""
    first, second = run.layers([0])
    times, names = RATE * np.array(steps), lab.items.names
    losses = [subset_losses(lab.items.targets.T, first[0], second[0], subset, times) for subset in subsets]
    kept = [np.isin(range(len(names)), subset) for subset in subsets]
    return (
        xr.DataArray(np.stack(losses, 1), {"step": list(steps), "query": names}, ("step", "replay", "query")),
        xr.DataArray(kept, {"train": names}, ("replay", "train")),
    )


def agreement_with_retraining(run: Run, subsets: Sequence[Sequence[int]], losses: xr.DataArray) -> float:
    """Correlation of the losses with those of runs that were trained on the subsets, the least over time."""
    every = range(losses.sizes["query"])
    without = [Schedule.whole_run(np.setdiff1d(every, subset).tolist(), 0.0) for subset in subsets]
    trained = retrain(run.task, run.start, without, run.order, losses["step"].values.tolist())
    pairs = zip(trained.sel(query=losses["query"]).values, losses.values, strict=True)
    return min(correlation(a, b) for a, b in pairs)


def datamodelling_score(estimate: xr.Dataset, losses: xr.DataArray, kept: xr.DataArray) -> xr.Dataset:
    """The linear datamodelling score along ``step``, NaN where there is no estimate."""
    there = np.intersect1d(losses["step"], estimate["step"])
    return lds(estimate, losses.sel(step=there), kept).reindex(step=losses["step"])


def _table(scores: Scores, times: Floats, untrusted: Sequence[bool]) -> Table:
    columns = ["Estimator", "Influence", *(f"t = {time:g}" for time in times)]
    rows = []
    for (kind, name), result in scores.items():
        cells = _cells(*(result[f"lds{end}"].values for end in ("", "_lower", "_upper")))
        if (kind, name) == ("moment", "damped"):
            cells = [f"{cell} *" if bad else cell for cell, bad in zip(cells, untrusted, strict=True)]
        rows.append([name, _KINDS[kind], *cells])
    title = "LDS at every time, 95% interval (* not localised: the damping does not outweigh the negative curvature)"
    return Table(title, columns, rows, frozenset(columns))  # words, so that intervals take a line of their own


def _cells(value: Floats, lower: Floats, upper: Floats) -> list[str]:
    numbers = zip(value, lower, upper, strict=True)
    return [f"{words.score(v)} [{words.score(low)}, {words.score(high)}]" for v, low, high in numbers]


def _cell(result: xr.Dataset, k: int) -> str:
    return _cells(*(result[f"lds{end}"].values[[k]] for end in ("", "_lower", "_upper")))[0]


@style.styled
def _draw(lab: Lab, times: Floats, scores: Scores, untrusted: Sequence[bool]) -> Figure:
    figure = style.canvas(6.2)
    axes = figure.subplots(2, 2)
    for ax, (kind, title) in zip(axes.flat, _KINDS.items(), strict=False):
        for (of, name), result in scores.items():
            if of == kind:
                _line(ax, times, name, result, untrusted if (kind, name) == ("moment", "damped") else [])
        ax.set_title(f"LDS of influence {title}")
        _axes(ax, times)
        ends = [(s["lds"].values, name, _COLOURS[name]) for (of, name), s in scores.items() if of == kind]
        drawing.label_ends(ax, times, ends, 2.3)
    _resemblance(axes[1, 1], lab)
    _axes(axes[1, 1], times)
    for ax in axes[1]:
        ax.set_xlabel(drawing.TIME)
    return figure


def _line(ax: Axes, times: Floats, name: str, result: xr.Dataset, untrusted: Sequence[bool]) -> None:
    """Scores of one estimator with their band; hollow where they rest on an untrusted checkpoint."""
    colour, values = _COLOURS[name], result["lds"].values
    ax.fill_between(times, result["lds_lower"], result["lds_upper"], color=colour, alpha=0.12, linewidth=0)
    ax.plot(times, values, "--o" if name == "unrolling" else "-o", color=colour, markersize=3.5, linewidth=1.3)
    for time, value, hollow in zip(times, values, untrusted, strict=False):
        if hollow:
            ax.plot(time, value, "o", color="white", markeredgecolor=colour, markersize=4.5)


def _resemblance(ax: Axes, lab: Lab) -> None:
    first, *_, last = lab.settings.attribution_times
    times = np.linspace(first, last, 101)
    here = resemblance.exact_influence(lab, 0, times)
    ax.fill_between(
        times, *resemblance.over_items(here, lab.settings.resamples), color=style.INK, alpha=0.1, linewidth=0
    )
    ax.plot(times, resemblance.over_starts(lab, times).T, color="#46a2d0", linewidth=0.5)
    ax.plot(times, resemblance.resemblance(here), color=style.INK)
    ax.set_title("Spearman of exact influence with that at the end")


def _axes(ax: Axes, times: Floats) -> None:
    drawing.time_axis(ax, (times[0] - 0.05, times[-1] + 0.05))
    ax.set_ylim(-1.05, 1.05)
    ax.set_yticks((-1, -0.5, 0, 0.5, 1))
