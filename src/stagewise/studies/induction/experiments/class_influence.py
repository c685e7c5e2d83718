"""Which tokens teach the network when: exact influence of every class of tokens over training.

What was said before the study was run: if tokens matter most while what they are about is learnt, the influence of
induction tokens on the excess is most helpful in a window whose middle lies within the transition, between 5 % and 90 %
of the last prefix matching. In the first steps all tokens teach to count, whatever their class. So the same is looked
at, but not held to anything, over the windows that begin where the network is nearest to the unigram rule or later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.dynamics.events import Event, events
from stagewise.dynamics.stages import Transition
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.studies.effects import of_classes
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.induction import drawing
from stagewise.studies.induction.classes import CLASSES
from stagewise.studies.induction.influence import control, exact
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.stages import counts_best
from stagewise.studies.induction.training import EXCESS, LOSS
from stagewise.studies.transitions import mark

_ABOUT = "induction"


class _Peak(NamedTuple):
    """Middle of a window, and what induction tokens and as many drawn by chance do to the excess in it."""

    step: float
    value: float
    by_chance: float


@dataclass(frozen=True, eq=False)
class _Run:
    """Influence of whole classes ``(step, train, query)`` of one run and of its control, and where they change sign."""

    classes: xr.DataArray
    chance: xr.DataArray
    flips: Sequence[Event]
    chance_flips: Sequence[Event]
    transition: Transition | None
    counting: int
    middle: float

    @classmethod
    def of(cls, lab: Lab, seed: int) -> _Run:
        classes, chance = exact(lab, seed), control(lab, seed)
        return cls(
            of_classes(classes),
            of_classes(chance),
            _flips(classes),
            _flips(chance),
            lab.transition(seed),
            counts_best(lab.stages(seed)),
            lab.settings.window / 2,
        )

    def peak(self, first: int = 0) -> _Peak:
        """The window, of those from ``first`` on or the last, in which induction tokens lower the excess most."""
        later = slice(min(first, int(self.classes["step"][-1])), None)
        curves = [part.sel(train=_ABOUT, query=EXCESS, step=later) for part in (self.classes, self.chance)]
        place = int(curves[0].argmin("step"))
        return _Peak(float(curves[0]["step"][place]) + self.middle, *(float(curve[place]) for curve in curves))

    def within(self, step: float) -> bool:
        """Whether a step lies within the transition, if there is one."""
        return self.transition is not None and self.transition.lower <= step <= self.transition.upper

    def turns(self, train: str, query: str, chance: bool = False) -> list[float]:
        """Where the influence of a class, or of its control, changes sign, by the middles of windows."""
        flips = self.chance_flips if chance else self.flips
        return [flip.step + self.middle for flip in flips if (flip.train, flip.query) == (train, query)]


def _flips(influence: xr.Dataset) -> list[Event]:
    return [event for event in events(influence) if event.kind == "flip"]


def class_influence(lab: Lab) -> Experiment:
    """Influence of the classes over training in all runs."""
    runs, count = [_Run.of(lab, seed) for seed in lab.seeds], words.count(lab.settings.seeds, "run")
    checks, told = [], []
    for which, peaks in {
        "": [run.peak() for run in runs],
        "once networks count, ": [run.peak(run.counting) for run in runs],
    }.items():
        inside = sum(peak.value < 0 and run.within(peak.step) for run, peak in zip(runs, peaks, strict=True))
        what = f"{which}seeds whose peak of induction → excess lies within the transition"
        counted = Check.reported(what, inside, ".0f") if which else Check.at_least(what, inside, len(runs), ".0f")
        steps, values, chance = zip(*peaks, strict=True)
        checks += [
            counted,
            Check.reported(f"{which}middle of the window of that peak, each seed", steps, ".0f"),
            Check.reported(f"{which}the peak in nats per unit weight of all induction tokens, each seed", values),
            Check.reported(f"{which}as many tokens drawn by chance in that window, each seed", chance),
        ]
        told.append(f"around {words.steps(steps)}, within the transition in {inside} of {count}")
    turns = [run.turns(_ABOUT, EXCESS) for run in runs]
    inner = [sum(map(run.within, some)) for run, some in zip(runs, turns, strict=True)]
    by_chance = [len(run.turns(_ABOUT, EXCESS, chance=True)) for run in runs]
    checks += [
        Check.reported("sign flips of induction → excess, each seed", list(map(len, turns)), ".0f"),
        Check.reported("of these within the transition, each seed", inner, ".0f"),
        Check.reported("sign flips of as many tokens drawn by chance → excess, each seed", by_chance, ".0f"),
    ]
    finding = (
        f"The influence of induction tokens on the excess is most helpful in windows {told[0]}; once the networks "
        f"count, in windows {told[1]}: {_listed(values)} nats per unit weight, where that of as many tokens drawn by "
        f"chance is {_listed(chance)}."
    )
    claim = Claim(
        "Training data matter most while what they are about is being learnt",
        f"Said beforehand of induction tokens and the excess. Most helpful in windows {told[0]}; of the windows after "
        f"the first stage, {told[1]}.",
    )
    each = _caption("the loss on each class of tokens, first run", lab)
    plates = [
        Plate("influence-on-excess", _caption("the excess, every run", lab), _draw_seeds(lab, runs)),
        Plate("influence-on-classes", each, _draw_classes(lab, runs[0])),
    ]
    return Experiment(Section("Which tokens teach it, and when", [*plates, _table(runs)]), [finding], checks, [claim])


def _listed(values: Sequence[float]) -> str:
    return words.enumeration([words.number(value, 2) for value in values])


def _caption(what: str, lab: Lab) -> str:
    return (
        f"Exact influence of every class of training tokens on {what}, during windows of {lab.settings.window} steps, "
        "at their middles: nats per unit weight of all tokens of the class, negative is helpful. Dashed: as many "
        "tokens at the same places, drawn by chance. Shaded: the transition, with its onset."
    )


def _table(runs: Sequence[_Run]) -> Table:
    """How often the influence of each class turns, and how often within the transition."""

    def cell(run: _Run, train: str, query: str) -> str:
        turns = run.turns(train, query)
        return f"{len(turns)} ({sum(map(run.within, turns))})"

    trains, queries = (runs[0].classes[dim].values.tolist() for dim in ("train", "query"))
    rows = [[train, query, *(cell(run, train, query) for run in runs)] for train in trains for query in queries]
    columns = ["Class", "On", *(f"Seed {seed}" for seed in range(len(runs)))]
    title = "Sign flips of influence over training, and how many of them lie within the transition"
    return Table(title, columns, rows, frozenset(columns[:2]))


@style.styled
def _draw_seeds(lab: Lab, runs: Sequence[_Run]) -> Figure:
    figure = style.canvas(2.6 * -(-len(runs) // 3))
    axes = figure.subplots(-(-len(runs) // 3), min(3, len(runs)), sharex=True, sharey=True, squeeze=False)
    for seed, (ax, run) in enumerate(zip(axes.flat, runs, strict=False)):
        _curves(ax, lab, run, EXCESS)
        ax.set_title(f"seed {seed}")
    style.empty_axes_off(axes, len(runs))
    axes[0, 0].legend(frameon=False)
    style.name_axes(figure, drawing.STEPS, "influence on the excess")
    return figure


@style.styled
def _draw_classes(lab: Lab, run: _Run) -> Figure:
    figure = style.canvas(5.0)
    axes = figure.subplots(2, 2, sharex=True)
    for ax, name in zip(axes.flat, CLASSES, strict=True):
        _curves(ax, lab, run, f"{LOSS}:{name}")
        ax.set_title(f"on {name} tokens")
    axes[0, 0].legend(frameon=False)
    style.name_axes(figure, drawing.STEPS, "influence on the loss")
    return figure


def _curves(ax: Axes, lab: Lab, run: _Run, query: str) -> None:
    drawing.step_axis(ax, lab.settings.last, zero=True)
    mark(ax, run.transition)
    middles = run.classes["step"].values + run.middle
    for name in CLASSES:
        for part, line, label in ((run.classes, "-", name), (run.chance, "--", None)):
            curve = np.asarray(part.sel(train=name, query=query))
            ax.plot(middles, curve, line, color=drawing.CLASS_COLOURS[name], linewidth=1.2, label=label)
