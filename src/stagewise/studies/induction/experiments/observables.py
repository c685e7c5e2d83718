"""What the local posterior tells over training, from one set of draws per checkpoint, beside the network's own stages.

Three observables: the local learning coefficient; the share of the top eigenvalue of the covariance of losses, between
kinds of tokens (class and third of the sequence); and the influence of induction tokens on the excess.

What was said before they were computed over training (a pilot at steps 300 to 375 of the first run, made for the
chains' diagnostics and cost, had shown the coefficient at these): over the transition, from 5 % to 90 % of the last
prefix matching, the local learning coefficient rises, and within it the share of the top eigenvalue is largest and the
influence of induction tokens on the excess most helpful, in every run.

Nothing is said of covariance between phases. It needs a posterior that holds both, and how far the draws of one
checkpoint reach is measured here: labels of phases would only cut a single one in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from stagewise.dynamics.alignment import alignment
from stagewise.dynamics.events import Event
from stagewise.dynamics.stages import Transition, extrema
from stagewise.influence.llc import llc
from stagewise.influence.trusted import NoTrustedCheckpointError
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.induction import drawing
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.observed import excess, influence, spectrum, traces
from stagewise.studies.induction.settings import OBSERVED_RUNS, OBSERVED_SEQUENCES, POSTERIOR
from stagewise.studies.induction.training import EXCESS
from stagewise.studies.seeds import t_interval
from stagewise.studies.transitions import mark

LLC, SHARE, BIF = "local learning coefficient", "share of the top eigenvalue", "influence of induction on the excess"
_PEAKS = {LLC: "maximum", SHARE: "maximum", BIF: "minimum"}
_ATTENTION = {"previous_token": "token before", "prefix_matching": "what followed"}
_ALIGNED = {
    "statistic": ("mean distance in steps", ".0f"),
    "null_median": ("the same pattern at another time, median", ".0f"),
    "p_value": ("share of other times that are as near (p)", ".3f"),
}
_REACH = "spread of the excess over draws / its fall over the transition, largest of checkpoints"
_NONE = float("nan")


@dataclass(frozen=True, eq=False)
class _Run:
    """What the posterior tells of one run.

    Attributes:
        seed: which run.
        curves: of every observable ``value`` and ``stderr`` ``(step)``, at the checkpoints whose chains can be trusted.
        excess: of the draws: ``spread``, their standard deviation, and ``anchor``, at the checkpoint, ``(step)``, nats.
        diagnostics: of all checkpoints, see :func:`stagewise.diagnose_run`.
        transition: of the network, if there is one.
    """

    seed: int
    curves: Mapping[str, xr.Dataset]
    excess: xr.Dataset
    diagnostics: xr.Dataset
    transition: Transition | None

    @classmethod
    def of(cls, lab: Lab, seed: int) -> _Run | None:
        """None where no checkpoint's chains can be trusted."""
        store = traces(lab, seed)
        try:
            learnt = llc(store, part="even")
        except NoTrustedCheckpointError:
            return None
        steps = learnt["step"].values.tolist()
        curves = {LLC: learnt, SHARE: spectrum(store), BIF: influence(store)}
        return cls(seed, curves, excess(store, steps), store.diagnostics, lab.transition(seed))

    def top(self, name: str) -> float:
        """The checkpoint where an observable is largest (influence: most helpful)."""
        value = self.curves[name]["value"]
        return float(value["step"][int((value if _PEAKS[name] == "maximum" else -value).argmax("step"))])

    def peak(self, name: str) -> Transition | None:
        """The same if noise cannot have made it, with its interval."""
        turns = (turn for turn in extrema(self.curves[name]) if turn.kind == _PEAKS[name])
        return next((turn for turn in turns if turn.step == self.top(name)), None)

    def when(self, name: str) -> tuple[float, float, float]:
        """Step of that checkpoint, and the ends of its interval: NaN where noise may have made the peak."""
        peak = self.peak(name)
        return self.top(name), *((peak.lower, peak.upper) if peak else (_NONE, _NONE))

    def within(self, name: str) -> bool:
        """Whether it is within the transition, if there is one; an influence must also be helpful there."""
        inside = self.transition is not None and self.transition.lower <= self.top(name) <= self.transition.upper
        return inside and (_PEAKS[name] == "maximum" or float(self.curves[name]["value"].min()) < 0)

    def rise(self) -> tuple[float, float, float]:
        """By how much the local learning coefficient rises over the transition, with its interval; NaN without one."""
        if self.transition is None:
            return _NONE, _NONE, _NONE
        before, after = _at_ends(self.transition, self.curves[LLC])
        return t_interval(after["replicates"].values - before["replicates"].values)

    def reach(self) -> float:
        """Largest spread of the excess over the draws of a checkpoint / what it falls by over the transition."""
        if self.transition is None:
            return _NONE
        before, after = _at_ends(self.transition, self.excess)
        return float(self.excess["spread"].max() / (before["anchor"] - after["anchor"]))

    def aligned(self) -> Mapping[str, float]:
        """How near the peaks that noise cannot have made are to half of the transition."""
        peaks = {name: peak for name in _PEAKS if (peak := self.peak(name))}
        if self.transition is None or not peaks:
            return dict.fromkeys(_ALIGNED, _NONE)
        happened = [Event(name, name, EXCESS, p.step, p.lower, p.upper, {}) for name, p in peaks.items()]
        half = replace(self.transition, step=self.transition.detail["half"])
        steps = self.diagnostics["step"].values
        return alignment(happened, [half], span=(float(steps[0]), float(steps[-1])), axis=np.asarray).attrs


def _at_ends(transition: Transition, curve: xr.Dataset) -> list[xr.Dataset]:
    """At the checkpoints nearest to both ends of the transition."""
    return [curve.sel(step=step, method="nearest") for step in (transition.lower, transition.upper)]


def observables(lab: Lab) -> Experiment:
    """Observables of the first runs, beside their transitions."""
    asked = lab.seeds[:OBSERVED_RUNS]
    runs = [run for seed in asked if (run := _Run.of(lab, seed)) is not None]
    title = "What the local posterior tells"
    if not runs:
        finding = f"Chains of the local posterior can be trusted at no checkpoint of {words.count(len(asked), 'run')}."
        return Experiment(Section(title, []), [finding], [])
    rises, aligned = [run.rise() for run in runs], [run.aligned() for run in runs]
    held = {
        f"seeds whose {LLC} rises over the transition": sum(low > 0 for _, low, _ in rises),
        f"seeds whose {SHARE} is largest within the transition": sum(run.within(SHARE) for run in runs),
        f"seeds whose {BIF} is most helpful within the transition": sum(run.within(BIF) for run in runs),
    }
    checks = [
        *_diagnosed(runs),
        *(Check.at_least(what, number, len(asked), ".0f") for what, number in held.items()),
        _each(f"rise of the {LLC} over the transition, each seed", rises, ".2f"),
        *(_each(f"{_PEAKS[name]} of the {name}: step, each seed", [run.when(name) for run in runs]) for name in _PEAKS),
        *(
            Check.reported(f"these vs half of the transition: {what}, each seed", [one[key] for one in aligned], form)
            for key, (what, form) in _ALIGNED.items()
        ),
        Check.reported(f"{_REACH}, each seed", [run.reach() for run in runs], ".3f"),
    ]
    said = "; ".join(f"{what}: {number} of {len(asked)}" for what, number in held.items())
    claim = Claim("Observables of the local posterior mark the network's transitions", f"Said beforehand. {said}.")
    plate = Plate("observables", _caption(), _draw(lab, runs))
    section = Section(title, [plate, _table(runs, rises, aligned)])
    return Experiment(section, [f"Of the local posterior, said beforehand: {said}."], checks, [claim])


def _each(what: str, found: Sequence[tuple[float, float, float]], form: str = ".0f") -> Check:
    values, lower, upper = zip(*found, strict=True)
    return Check.reported(what, values, form, lower=lower, upper=upper)


def _diagnosed(runs: Sequence[_Run]) -> list[Check]:
    """What chose the posterior."""
    all_steps = xr.concat([run.diagnostics for run in runs], "step")
    trusted = sum(run.excess.sizes["step"] for run in runs)
    return [
        Check.reported("checkpoints whose chains can be trusted, and all", [trusted, all_steps.sizes["step"]], ".0f"),
        Check.reported("largest R-hat of their chains", float(all_steps["rhat"].max()), ".2f"),
        Check.reported("largest share of second order in the spread", float(all_steps["even_share"].max()), ".3f"),
    ]


def _table(
    runs: Sequence[_Run], rises: Sequence[tuple[float, float, float]], aligned: Sequence[Mapping[str, float]]
) -> Table:
    rows = []
    for run, rise, one in zip(runs, rises, aligned, strict=True):
        band = run.transition and f"{run.transition.lower:.0f} to {run.transition.upper:.0f}"
        peaks = [_written(*run.when(name), ".0f") for name in _PEAKS]
        near = [Check.reported("", one[key], form).text for key, (_, form) in _ALIGNED.items()]
        rows.append([str(run.seed), band or "–", _written(*rise, ".2f"), *peaks, *near])
    columns = ["Seed", "Transition", "LLC rises by", "LLC largest", "Share largest", "Influence most helpful"]
    title = (
        "Steps of the peaks, with 95% intervals where noise cannot have made them, and their mean distance from half "
        "of the transition: that of the same pattern at another time (median), and the share of times as near"
    )
    return Table(title, [*columns, "Distance", "at another time", "p"], rows, frozenset({"Transition"}))


def _written(value: float, lower: float, upper: float, form: str) -> str:
    ends = {} if np.isnan(lower) else {"lower": lower, "upper": upper}
    return Check.reported("", value, form, **ends).text


def _caption() -> str:
    return (
        f"One column for each seed. From above: attention of the best head; the {LLC}; the {SHARE} of the covariance "
        f"of losses between kinds of tokens; the {BIF}, nats per unit weight of all induction tokens, negative is "
        f"helpful. All of one set of draws with gamma {POSTERIOR.gamma:g} and n_beta {POSTERIOR.n_beta:g} on "
        f"{OBSERVED_SEQUENCES} sequences; bands are 1.96 standard errors. Shaded: the transition, with its onset."
    )


@style.styled
def _draw(lab: Lab, runs: Sequence[_Run]) -> Figure:
    figure = style.canvas(6.4)
    axes = figure.subplots(1 + len(_PEAKS), len(runs), sharex=True, sharey="row", squeeze=False)
    colours = style.colours([*_ATTENTION, *_PEAKS])
    titles = ["attention", "LLC", "share", "influence"]
    for column, run in zip(axes.T, runs, strict=True):
        for ax in column:
            drawing.step_axis(ax, lab.settings.observed[-1], zero=ax is column[-1])
            mark(ax, run.transition)
        stages = lab.stages(run.seed)
        for name, text in _ATTENTION.items():
            column[0].plot(stages["step"], stages[name], color=colours[name], linewidth=1, label=text)
        for ax, (name, curve) in zip(column[1:], run.curves.items(), strict=True):
            steps, value, doubt = (np.asarray(x) for x in (curve["step"], curve["value"], 1.96 * curve["stderr"]))
            ax.fill_between(steps, value - doubt, value + doubt, color=colours[name], alpha=0.25, linewidth=0)
            ax.plot(steps, value, color=colours[name], linewidth=1)
        column[0].set_title(f"seed {run.seed}")
    for ax, title in zip(axes[:, 0], titles, strict=True):
        ax.set_ylabel(title)
    axes[0, 0].legend(frameon=False, loc="upper left", fontsize=6, handlelength=1)
    style.name_axes(figure, drawing.STEPS)
    return figure
