"""Which tokens teach the network when: exact influence of every class of tokens over training, and its stages.

What was said before any influence was computed, from what the rules and the contexts of the classes are: the influence
of a class on itself is most helpful near the stage that is about it (:data:`ABOUT`). What is frequent is learnt with
the unigram rule, what a word goes on with is learnt with the bigram rule, and what the context has shown before while
repetitions come to cost less than first occurrences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.dynamics.alignment import alignment
from stagewise.dynamics.events import Event, events
from stagewise.dynamics.stages import Transition
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.studies.effects import of_classes
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.language.classes import CLASSES, FIRST, INDUCTION
from stagewise.studies.language.influence import CHANCE, SAME_WORDS, exact
from stagewise.studies.language.lab import Lab
from stagewise.studies.seeds import t_interval
from stagewise.studies.transitions import mark

ABOUT = {
    INDUCTION: "repetition",
    FIRST: "bigram",
    "keyword": "unigram",
    "left delimiter": "unigram",
    "right delimiter": "unigram",
    "formatting": "unigram",
    "word start": "bigram",
    "word part": "bigram",
    "word end": "bigram",
}
"""By class, the network's transition that it was said to belong to."""

_CONTROLS = "Dashed: as many tokens at the same places, drawn by chance; dotted: the same words elsewhere."
_COLOURS = style.colours(CLASSES)
_STYLES = {"classes": "-", CHANCE: "--", SAME_WORDS: ":"}


@dataclass(frozen=True, eq=False)
class _Run:
    """What one run says.

    Attributes:
        curves: influence of whole classes ``(step, train, query)``, by labelling; steps are the middles of windows.
        happened: flips and peaks of the classes' own.
        transitions: of the network.
    """

    curves: dict[str, xr.DataArray]
    happened: Sequence[Event]
    transitions: Sequence[Transition]

    @classmethod
    def of(cls, lab: Lab, seed: int) -> _Run:
        middle = lab.settings.window / 2
        found = {name: _moved(exact(lab, seed, name), middle) for name in _STYLES}
        curves = {name: of_classes(one) for name, one in found.items()}
        return cls(curves, events(found["classes"]), lab.transitions(seed))

    @property
    def peaks(self) -> list[Event]:
        """Where the influence of each class on itself is most helpful."""
        return [one for one in self.happened if one.kind == "helpful peak" and one.train == one.query]

    @property
    def flips(self) -> int:
        """Changes of sign of all pairs."""
        return sum(one.kind == "flip" for one in self.happened)

    def on_itself(self, name: str, labelling: str = "classes") -> xr.DataArray:
        """Influence of a class on itself, ``(step)``."""
        return self.curves[labelling].sel(train=name, query=name)

    def peak(self, name: str) -> float:
        """Middle of the window in which a class helps itself most."""
        curve = self.on_itself(name)
        return float(curve["step"][int(curve.argmin("step"))])

    def transition(self, name: str) -> Transition | None:
        """The one of this name, if there is one."""
        return next((one for one in self.transitions if one.name == name), None)


def _moved(influence: xr.Dataset, middle: float) -> xr.Dataset:
    return influence.assign_coords(step=influence["step"] + middle)


def class_influence(lab: Lab) -> Experiment:
    """Influence of the classes over training in all runs."""
    runs = [_Run.of(lab, seed) for seed in lab.seeds]
    aligned = [_aligned(run, lab.settings.last) for run in runs]
    within = [_within(run, INDUCTION) for run in runs]
    count = words.count(len(runs), "run")
    checks = [
        Check.at_least(
            "seeds whose peak of induction patterns lies in the rise of repetition", sum(within), len(runs), ".0f"
        ),
        Check.reported(
            "distance of all peaks from their stages, mean |log step|, each seed", _attr(aligned, "statistic"), ".2f"
        ),
        Check.reported("the same pattern at another time, median, each seed", _attr(aligned, "null_median"), ".2f"),
        Check.reported("share of other times that are as near (p), each seed", _attr(aligned, "p_value"), ".3f"),
        Check.reported("sign flips of all pairs of classes, each seed", [run.flips for run in runs], ".0f"),
        *(_check(runs, name) for name in CLASSES),
    ]
    p = words.enumeration([words.score(value) for value in _attr(aligned, "p_value")])
    finding = (
        f"Induction patterns help one another most within the rise of repetition in {sum(within)} of {count}. That the "
        "peaks of all classes are as near to the stages they were said to belong to as they are, would come at another "
        f"time of the run with p = {p}."
    )
    claim = Claim(
        "Training data matter most while what they are about is being learnt",
        f"Said beforehand of each class and itself. Induction patterns: in {sum(within)} of {count}; all classes: "
        f"p = {p}.",
    )
    plates = [
        Plate("influence-on-itself", f"{_caption('itself, every run', lab)} {_CONTROLS}", _draw_own(runs)),
        Plate("influence-on-classes", _caption("the loss on each class, first run", lab), _draw_classes(runs[0])),
    ]
    return Experiment(Section("Which tokens teach it, and when", [*plates, _table(runs)]), [finding], checks, [claim])


def _aligned(run: _Run, last: int) -> xr.Dataset | None:
    """Peaks against the transitions they were said to belong to, where the run has these."""
    there = {one.name for one in run.transitions}
    stage = {name: about if about in there else None for name, about in ABOUT.items()}
    if not any(stage[peak.train] for peak in run.peaks):
        return None
    return alignment(run.peaks, run.transitions, span=(0, last), match=lambda peak: stage[peak.train])


def _attr(aligned: Sequence[xr.Dataset | None], name: str) -> list[float]:
    return [float("nan") if one is None else float(one.attrs[name]) for one in aligned]


def _within(run: _Run, name: str) -> bool:
    """Whether a class helps itself most within the transition it is about."""
    stage = run.transition(ABOUT[name])
    return stage is not None and float(run.on_itself(name).min()) < 0 and stage.lower <= run.peak(name) <= stage.upper


def _check(runs: Sequence[_Run], name: str) -> Check:
    """When a class helps itself most: the geometric mean of the seeds' steps, and their range."""
    steps = [run.peak(name) for run in runs]
    what = f"middle of the window in which {name} tokens help one another most, mean [range] of seeds"
    return Check.reported(what, np.exp(np.log(steps).mean()), ".0f", lower=min(steps), upper=max(steps))


def _caption(what: str, lab: Lab) -> str:
    return (
        f"Exact influence of every class of training tokens on {what}, during windows of {lab.settings.window} steps, "
        "at their middles: nats per unit weight of all tokens of the class, negative is helpful. It grows and falls "
        "with the learning rate too. Shaded: the stage of the first run that the class of the panel was said to belong "
        "to."
    )


def _table(runs: Sequence[_Run]) -> Table:
    """Each class on itself where it helps most, beside its controls in the same windows."""
    rows = []
    for name in CLASSES:
        values = []
        for labelling in _STYLES:
            at = [float(run.on_itself(name, labelling).sel(step=run.peak(name))) for run in runs]
            mean, lower, upper = t_interval(at)
            values.append(Check.reported(name, mean, ".3f", lower=lower, upper=upper).text)
        stages = [run.transition(ABOUT[name]) for run in runs]
        when = words.enumeration([words.step_number(one.step) for one in stages if one is not None])
        rows.append([name, _check(runs, name).text, f"{ABOUT[name]} ({when or 'in no run'})", *values])
    columns = ["Class", "Helps itself most at step", "Said to be about", "Influence then", "By chance", "Same words"]
    title = (
        "Each class on itself: nats per unit weight of the class, means over seeds with 95 % intervals; steps: range"
    )
    return Table(title, columns, rows, frozenset(columns[:3:2]))


@style.styled
def _draw_own(runs: Sequence[_Run]) -> Figure:
    figure = style.canvas(7.0)
    axes = figure.subplots(3, 3, sharex=True)
    for ax, name in zip(axes.flat, CLASSES, strict=True):
        for number, run in enumerate(runs):
            for labelling, line in _STYLES.items():
                curve, label = run.on_itself(name, labelling), labelling if number == 0 else None
                ax.plot(curve["step"], curve, line, color=_COLOURS[name], linewidth=1, label=label)
        _finish(ax, runs[0], name, name)
    axes[0, 0].legend(frameon=False, fontsize=6.5)
    style.name_axes(figure, style.STEPS, "influence on itself")
    return figure


@style.styled
def _draw_classes(run: _Run) -> Figure:
    figure = style.canvas(7.0)
    axes = figure.subplots(3, 3, sharex=True)
    for ax, query in zip(axes.flat, CLASSES, strict=True):
        for name, colour in _COLOURS.items():
            curve = run.curves["classes"].sel(train=name, query=query)
            ax.plot(curve["step"], curve, color=colour, linewidth=1, label=name)
        _finish(ax, run, query, f"on {query}")
    style.name_axes(figure, style.STEPS, "influence on the loss")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False)
    return figure


def _finish(ax: Axes, run: _Run, name: str, title: str) -> None:
    """Axis, and the stage that a class was said to belong to."""
    style.step_axis(ax, run.curves["classes"]["step"].values)
    ax.axhline(0, color="#9a9a9a", linewidth=0.7, zorder=1)
    mark(ax, run.transition(ABOUT[name]))
    ax.set_title(title)
