"""Leaving items out of the whole run: retraining against exact theory, and infinitely small changes of weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stagewise.reporting import style
from stagewise.reporting.page import Plate, Section
from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import Schedule
from stagewise.retraining.unrolling import unrolled_influence
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import Lab, correlation
from stagewise.studies.hierarchy.network import Run, optimizer, record, task
from stagewise.studies.hierarchy.settings import EVERY_TIME, RATE
from stagewise.studies.hierarchy.theory.removal import leave_one_out, subset_losses
from stagewise.studies.hierarchy.theory.response import first_order_response, whitened_response
from stagewise.studies.hierarchy.theory.tree import KINDS, Floats

# Central differences err by the square of this; smaller ones lose digits.
SMALL = 1e-4
WEIGHTS = (0.0, 0.5, 0.8, 0.95, 1 - SMALL, 1 + SMALL)


def leaving_out(lab: Lab) -> Experiment:
    """Closed forms and unrolling against retraining, from both starts, other widths and removed subsets."""
    times = EVERY_TIME[lab.settings.whole_run_steps]
    runs = {"aligned start": lab.aligned, "random start": lab.random}
    off = lab.off_diagonal
    closed = {name: _closed(lab, run) for name, run in runs.items()}
    measured = {name: retrained(lab, run, WEIGHTS) for name, run in runs.items()}
    response = {name: _response(lab, run) for name, run in runs.items()}
    wide = _untrained(lab, width=256)

    def least(what: str, predicted: Floats, retrained: Floats, bound: float) -> Check:
        return Check.at_least(f"{what}: r", correlation(predicted[:, off], retrained[:, off]), bound)

    checks = [
        least(f"leave-one-out, closed form vs retraining, {name}", closed[name], measured[name][0], bound)
        for name, bound in (("aligned start", 0.999), ("random start", 0.99))
    ]
    what = "leave-one-out, closed form vs retraining, random start, width 256"
    checks.append(least(what, _closed(lab, wide), retrained(lab, wide, [0.0])[0], 0.998))
    checks.append(_subsets(lab))
    for (name, run), bound in zip(runs.items(), (0.999, 0.99), strict=True):
        slope = _slope(measured[name])
        unrolled = lab.matrix(unrolled_influence(run.task, run.start, run.order, lab.settings.whole_run_steps))
        error = float(np.linalg.norm(unrolled - slope) / np.linalg.norm(slope))
        checks += [
            least(f"first-order response, closed form vs finite differences, {name}", response[name], slope, bound),
            Check.at_most(f"unrolling vs finite differences, {name}: relative error", error, 1e-5, ".1e"),
        ]
    checks += _beyond_first_order(lab, measured["aligned start"][0], response["aligned start"])
    finite = [correlation(measured["random start"][k][:, off], response["random start"][:, off]) for k in range(4)]
    weights = [f"{weight:g}" for weight in WEIGHTS[:4]]
    what = f"finite changes to weight {', '.join(weights)} vs first-order response, random start: r"
    checks.append(Check.reported(what, finite, ".2f"))
    at_weights = [f"{r:.2f} at weight {weight}" for r, weight in zip(finite, weights, strict=True)]
    findings = [
        "Leaving an item out of the whole run has an exact closed form, from any small start: it predicts what "
        f"retraining measures with r = {checks[1].text}, without a trained network.",
        "The removal of one item in eight is far from first order. Correlation of the exact first-order influence with "
        f"what a finite change of weight measures: {', '.join(at_weights)}.",
    ]
    caption = (
        "Influence of “dog” over training, by leaving it out of the whole run: retraining (dots) and the closed form "
        "(lines). Coarse relatives flip first. An item helps while what it shares with another is being learnt and "
        "hurts while what tells them apart is. The later return to helpful has another reason: the run with the item "
        "is a little ahead on the last stretch; no influence at a moment shows it."
    )
    figure = _draw(lab, times, closed, {name: influence[0] for name, influence in measured.items()})
    section = Section("Leaving items out of the whole run", [Plate("leaving-out", caption, figure)])
    return Experiment(section, findings, checks)


def _untrained(lab: Lab, **settings: Any) -> Run:
    """A run that has not made a step; only its start is used."""
    rule = optimizer(lab.items, "sgd", RATE)
    return record(task(lab.items, start="random", **settings), rule, 0, [0])


def retrained(lab: Lab, run: Run, weights: Sequence[float]) -> Floats:
    """Influence (l' - l) / (weight - 1) of every item at each weight, retrained: ``(weight, step, train, query)``."""
    items, steps = range(len(lab.items.names)), lab.settings.whole_run_steps
    schedules = [Schedule.whole_run([item], weight) for weight in weights for item in items]
    losses = retrain(run.task, run.start, [Schedule(), *schedules], run.order, steps).sel(query=lab.items.names).values
    effects = (losses[:, 1:] - losses[:, :1]).reshape(len(steps), len(weights), len(items), len(items))
    influence: Floats = effects.swapaxes(0, 1) / (np.array(weights) - 1)[:, None, None, None]
    return influence


def _slope(measured: Floats) -> Floats:
    """The central difference: one-sided slopes of equal steps up and down, averaged."""
    slope: Floats = measured[-2:].mean(0)
    return slope


def _closed(lab: Lab, run: Run) -> Floats:
    first, second = run.layers([0])
    return leave_one_out(lab.items.targets.T, first[0], second[0], EVERY_TIME[lab.settings.whole_run_steps])


def _response(lab: Lab, run: Run) -> Floats:
    """The first-order response in closed form, ``(step, train, query)``."""
    modes, _ = lab.predicted_strengths(run, EVERY_TIME[:1])
    first, second = run.layers([0])
    return first_order_response(modes, modes.initial(first[0], second[0]), EVERY_TIME)[lab.settings.whole_run_steps]


def _beyond_first_order(lab: Lab, left_out: Floats, response: Floats) -> list[Check]:
    """How far leaving an item out is from its first order, and from that for inputs that keep their weight."""
    times = EVERY_TIME[lab.settings.whole_run_steps]
    modes, start = lab.predicted_strengths(lab.aligned, times[:1])
    whitened = whitened_response(modes, float(start[0, 0, 0]), times)
    predictions = {"first-order response": response, "first-order response for fixed inputs": whitened}
    off = lab.off_diagonal
    return [
        Check.reported(
            f"leave-one-out vs {what}, aligned start: r", correlation(predicted[:, off], left_out[:, off]), ".3f"
        )
        for what, predicted in predictions.items()
    ]


def _subsets(lab: Lab, count: int = 30) -> Check:
    """Random halves of the items: loss trajectories of the items that are kept."""
    run, generator = _untrained(lab, width=64, seed=1), np.random.default_rng(0)
    items, steps = len(lab.items.names), lab.settings.whole_run_steps
    halves = [sorted(generator.choice(items, items // 2, replace=False).tolist()) for _ in range(count)]
    schedules = [Schedule.whole_run([i for i in range(items) if i not in kept], 0.0) for kept in halves]
    losses = retrain(run.task, run.start, schedules, run.order, steps).sel(query=lab.items.names).values
    first, second = run.layers([0])
    predicted = [
        subset_losses(lab.items.targets.T, first[0], second[0], kept, EVERY_TIME[steps])[:, kept] for kept in halves
    ]
    measured = [losses[:, run_, kept] for run_, kept in enumerate(halves)]
    r = correlation(np.stack(predicted), np.stack(measured))
    return Check.at_least(f"losses without {count} random halves, closed form vs retraining, width 64: r", r, 0.999)


@style.styled
def _draw(lab: Lab, times: Floats, closed: dict[str, Floats], measured: dict[str, Floats]) -> Figure:
    figure = style.canvas(3.4)
    axes = figure.subplots(1, len(closed), sharey=True)
    queries = {level: int(np.flatnonzero(lab.level[0] == level)[0]) for level in KINDS}
    for ax, name in zip(axes, closed, strict=True):
        drawing.time_axis(ax, times)
        for level, query in queries.items():
            colour, text = drawing.LEVEL_COLOURS[level], f"dog → {lab.items.names[query]} ({KINDS[level]})"
            ax.plot(times, closed[name][:, 0, query], color=colour, label=text)
            ax.plot(times[::3], measured[name][::3, 0, query], ".", color=colour, markersize=4)
        ax.set_title(name)
        ax.legend(frameon=False, loc="lower right")
    style.name_axes(figure, drawing.TIME, "influence (nats; negative = helpful)")
    return figure
