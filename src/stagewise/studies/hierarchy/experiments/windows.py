"""Influence at a moment: sampled, solved and in closed form, against leaving items out during a time window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from stagewise.dynamics.curves import curves
from stagewise.influence.damped import damped_influence
from stagewise.reporting import style
from stagewise.reporting.page import Plate, Section
from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import Schedule
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import Lab, correlation, slope
from stagewise.studies.hierarchy.network import Run
from stagewise.studies.hierarchy.settings import EVERY_TIME, LAST, RATE, WINDOW
from stagewise.studies.hierarchy.theory.kernels import gradient_kernel
from stagewise.studies.hierarchy.theory.removal import leave_one_out
from stagewise.studies.hierarchy.theory.tree import KINDS, Floats

LATER = 750
"""When the lasting effect of a window is looked at, beside its end: t = 3, between the last two stages."""


def windows(lab: Lab) -> Experiment:
    """What a window measures, and which estimators predict it."""
    off, run = lab.off_diagonal, lab.aligned
    measured = lab.matrix(lab.measured_windows)
    centre = window_kernel(lab, lab.times + RATE * WINDOW / 2)
    solved = lab.matrix(damped_influence(run.task, run.trajectory, lab.window_posterior, curvature="exact"))
    answered = [lab.steps.index(step) for step in lab.sampled_windows["step"].values.tolist()]
    sampled, seen = lab.matrix(lab.sampled_windows), measured[answered]
    r, size = correlation(sampled[:, off], seen[:, off]), slope(sampled[:, off], seen[:, off])
    products = -gradient_products(run, lab.steps)
    checks = [
        Check.at_least("gradient kernel, closed form vs the network's own gradients: r",
                       correlation(window_kernel(lab, lab.times)[:, off], products[:, off]), 0.999),
        Check.at_least("window ablation (length 0.1) vs gradient kernel at its centre: r",
                       correlation(centre[:, off], measured[:, off]), 0.99),
        Check.at_least("window ablation vs sampled BIF of that window: r", r, 0.95),
        Check.near("window ablation vs sampled BIF of that window: slope measured / predicted", size, 1, 0.1, ".3f"),
        Check.reported("window ablation vs the exact damped influence function: r",
                       correlation(solved[:, off], measured[:, off])),
        Check.reported("window ablation vs the exact damped influence function: slope measured / predicted",
                       slope(solved[:, off], measured[:, off]), ".3f"),
    ]  # fmt: skip
    swept, later, last, loss = _sweep(lab)
    near = max(_nearest_peaks(lab, swept, level) for level in KINDS)
    share = np.abs(last[:, off]).max(1) / loss
    left, peaks = _left_at_the_end(share, loss), _peaks(lab)
    checks += _sweep_checks(near, share, loss, peaks)
    findings = [
        f"Sampled influence predicts what a window of {WINDOW} steps measures in order and in size, with nothing "
        f"fitted: r = {r:.3f} over all off-diagonal pairs and times, slope {size:.2f}.",
        "Removing an item during a window changes its relatives' losses most, at the window's end, where the influence "
        f"at that moment has its extrema: the sweep's lie within {near:.2f} of those of the gradient kernel, in "
        f"units of t, for every kind. That is gone at the end: {left}.",
    ]
    section = Section(
        "Influence at a moment",
        [
            Plate("three-measures", _measures_caption(), _draw_measures(lab, products)),
            Plate("window-sweep", _sweep_caption(), _draw_sweep(lab, swept, later)),
        ],
    )
    return Experiment(section, findings, checks, [_window_claim(lab, near, later[:, off], left), _peak_claim(peaks)])


def _sweep_checks(near: float, share: Floats, loss: float, peaks: Mapping[str, tuple[float, float]]) -> list[Check]:
    end = f"t = {RATE * LAST:g}"
    return [
        Check.reported("sweep of windows: largest distance in t of extrema from the gradient kernel's", near, ".2f"),
        Check.reported(f"sweep of windows: least and largest share of the loss that is left at {end}",
                       [share.min(), share.max()], ".0%"),
        Check.reported(f"mean loss of an item at {end}, nats", loss, ".0e"),
        *(Check.reported(f"harmful peak of {kind} pairs, of the gradient kernel and of the whole run: t", both, ".2f")
          for kind, both in peaks.items()),
    ]  # fmt: skip


def _left_at_the_end(share: Floats, loss: float) -> str:
    return (
        f"at t = {RATE * LAST:g} the windows leave between {share.min():.0%} and {share.max():.0%} of a loss of "
        f"{loss:.0e} nats"
    )


def _window_claim(lab: Lab, near: float, later: Floats, left: str) -> Claim:
    best = lab.settings.window_starts[int(np.abs(later[: _past(lab)]).max(1).argmax())]
    return Claim(
        "Removing a sample only during a window changes the loss most if the window is at an extremum of influence",
        f"True of the loss at the window's end (extrema within {near:.2f} in t). Not of a later loss: at "
        f"t = {RATE * LATER:g} the window that starts at t = {RATE * best:.2f} counts most; {left}.",
    )


def _peaks(lab: Lab) -> dict[str, tuple[float, float]]:
    """When the mean pair of each kind is most harmful: at a moment, and left out of the whole run."""
    first, second = lab.aligned.layers([0])
    whole = leave_one_out(lab.items.targets.T, first[0], second[0], EVERY_TIME)
    moment = window_kernel(lab, EVERY_TIME)

    def peak(influence: Floats, level: int) -> float:
        return float(EVERY_TIME[(influence * lab.of_kind(level)).sum((1, 2)).argmax()])

    return {kind: (peak(moment, level), peak(whole, level)) for level, kind in KINDS.items()}


def _peak_claim(peaks: Mapping[str, tuple[float, float]]) -> Claim:
    late = ", ".join(f"{moment:.2f} and {whole:.2f} ({kind})" for kind, (moment, whole) in peaks.items())
    return Claim(
        "Sampled influence and leaving a sample out of the whole run have the same shape",
        f"Alike, but not in time: the harmful peak at a moment and in the whole run is at t = {late}. One is a rate, "
        "the other what later training makes of it.",
    )


def _past(lab: Lab) -> int:
    """How many windows of the sweep are over at LATER."""
    return sum(start + WINDOW <= LATER for start in lab.settings.window_starts)


def gradient_products(run: Run, steps: list[int]) -> Floats:
    """Products of the items' gradients, of the network itself: ``(step, item, item)``."""
    first, second = run.layers(steps)
    targets = run.task.queries["items"].batch(slice(None))[1].numpy().T
    residual = targets - second @ first
    inner = (residual.swapaxes(1, 2) @ residual) * (first.swapaxes(1, 2) @ first)
    own = ((second.swapaxes(1, 2) @ residual) ** 2).sum(1)
    items = np.arange(inner.shape[1])
    inner[:, items, items] += own
    products: Floats = inner
    return products


def window_kernel(lab: Lab, times: Floats) -> Floats:
    """Influence of a window by the closed form of the gradients: ``(time, train, query)``."""
    modes, strengths = lab.predicted_strengths(lab.aligned, times)
    return -gradient_kernel(modes, strengths) * RATE * WINDOW


def _sweep(lab: Lab) -> tuple[Floats, Floats, Floats, float]:
    """Influence by leaving each item out in the windows of the sweep: at the window's end, at LATER, at LAST.

    All ``(start, train, query)``; and the mean loss of an item at LAST, nats. All runs are one batch from step 0, so
    that the prefix is shared exactly.
    """
    run, items, starts = lab.aligned, range(len(lab.items.names)), lab.settings.window_starts
    schedules = [Schedule.window([item], start, WINDOW, 0.0) for start in starts for item in items]
    ends = [start + WINDOW for start in starts]
    losses = retrain(
        run.task, run.start, [Schedule(), *schedules], run.order, sorted({*ends, LATER, LAST}), max_replays=512
    )
    change = (
        (losses.sel(replay=0) - losses.sel(replay=slice(1, None)))
        .sel(query=lab.items.names)
        .transpose("step", "replay", "query")
    )

    def at(step: int, chosen: slice = slice(None)) -> Floats:
        shape = (len(starts), len(items), len(items))
        of_starts: Floats = change.sel(step=step).values.reshape(shape)[chosen]
        return of_starts

    own_end = np.concatenate([at(end, slice(k, k + 1)) for k, end in enumerate(ends)])
    return own_end, at(LATER), at(LAST), float(losses.sel(replay=0, step=LAST).mean())


def _centres(lab: Lab) -> Floats:
    """Of the windows of the sweep, in t."""
    centres: Floats = RATE * (np.array(lab.settings.window_starts) + WINDOW / 2)
    return centres


def _nearest_peaks(lab: Lab, swept: Floats, level: int) -> float:
    """Largest distance in time between an extremum of the sweep and that of the gradient kernel."""
    measured = (swept * lab.of_kind(level)).sum((1, 2))
    centres = _centres(lab)
    predicted = (window_kernel(lab, EVERY_TIME) * lab.of_kind(level)).sum((1, 2))
    pairs = ((measured.argmin(), predicted.argmin()), (measured.argmax(), predicted.argmax()))
    return max(float(abs(centres[a] - EVERY_TIME[b])) for a, b in pairs)


def _measures_caption() -> str:
    return (
        "Three measures of the influence of “dog” on a sibling, a cousin and a plant. Left, at a moment: sampled, with "
        "95% band, gradient products, and leaving it out for one window. Right, leaving it out of the whole run, which "
        "carries the same influence through all later training. They share their shape, and their extrema do not "
        "coincide: the right ones come later. A whole-run ablation is no ground truth for influence at a checkpoint; a "
        "window ablation is."
    )


def _sweep_caption() -> str:
    return (
        "Leaving an item out during one window of length 0.1, by the window's centre, mean over the pairs of a kind. "
        "Left: its effect at the window's end (dots) follows the influence at that moment (lines, gradient kernel), so "
        f"that the extrema of both coincide. Right: what is left of it at t = {RATE * LATER:g}. The last windows count "
        "most there and the extrema are gone: which window mattered for a later loss is another question."
    )


@style.styled
def _draw_measures(lab: Lab, products: Floats) -> Figure:
    figure = style.canvas(5.2)
    axes = figure.subplots(len(KINDS), 2, sharex=True)
    banded, rate = curves(lab.sampled_windows), RATE * WINDOW
    times = RATE * banded["step"].values
    first, second = lab.aligned.layers([0])
    whole = leave_one_out(lab.items.targets.T, first[0], second[0], EVERY_TIME)
    windows = lab.matrix(lab.measured_windows)
    for (left, right), level in zip(axes, reversed(KINDS), strict=True):
        query, colour = int(np.flatnonzero(lab.level[0] == level)[0]), drawing.LEVEL_COLOURS[level]
        name = lab.items.names[query]
        one = banded.sel(train="dog", query=name)
        left.fill_between(times, one["lower"] / rate, one["upper"] / rate, color=colour, alpha=0.25, linewidth=0)
        left.plot(times, one["value"] / rate, color=colour, label="sampled BIF")
        left.plot(lab.times, products[:, 0, query], "--", color=style.INK, linewidth=0.9, label="− gradient product")
        left.plot(
            lab.times, windows[:, 0, query] / rate, ".", color=style.MUTED, markersize=4, label="left out in a window"
        )
        right.plot(EVERY_TIME, whole[:, 0, query], color=colour)
        for ax in (left, right):
            drawing.time_axis(ax, EVERY_TIME)
        left.set_title(f"dog → {name} ({KINDS[level]})")
    axes[0, 0].legend(frameon=False, loc="lower right")
    axes[0, 1].set_title("left out of the whole run")
    style.name_axes(figure, drawing.TIME, "influence (left: per unit of time; negative = helpful)")
    return figure


@style.styled
def _draw_sweep(lab: Lab, swept: Floats, later: Floats) -> Figure:
    figure = style.canvas(3.2)
    left, right = figure.subplots(1, 2)
    centres, kernel = _centres(lab), window_kernel(lab, EVERY_TIME)
    past = slice(_past(lab))
    for level in KINDS:
        colour, kind = drawing.LEVEL_COLOURS[level], lab.of_kind(level)
        left.plot(EVERY_TIME, (kernel * kind).sum((1, 2)), color=colour, label=KINDS[level])
        left.plot(centres, (swept * kind).sum((1, 2)), ".", color=colour, markersize=4)
        right.plot(centres[past], (later * kind).sum((1, 2))[past], ".-", color=colour, markersize=4)
    for ax, title in ((left, "at the window's end"), (right, f"at t = {RATE * LATER:g}")):
        drawing.time_axis(ax, centres if ax is left else centres[past])
        ax.set_title(title)
    left.legend(frameon=False, loc="lower right")
    style.name_axes(figure, "centre of the window", "influence (nats; negative = helpful)")
    return figure
