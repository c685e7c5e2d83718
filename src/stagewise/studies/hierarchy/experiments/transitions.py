"""How influence events line up with the model's own stages: branches of its representations, LLC, spectrum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from stagewise.dynamics.alignment import alignment
from stagewise.dynamics.branches import separations, squared_distances
from stagewise.dynamics.curves import curves
from stagewise.dynamics.events import Event
from stagewise.dynamics.spectrum import top_eigenvalue_share
from stagewise.dynamics.stages import Transition, extrema, rise
from stagewise.influence.bif import bif
from stagewise.influence.llc import llc
from stagewise.influence.trusted import ReadOnce
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.embedding import embedding
from stagewise.studies.hierarchy.lab import Lab, correlation
from stagewise.studies.hierarchy.settings import EVERY_TIME, LAST, RATE
from stagewise.studies.hierarchy.theory.kernels import gradient_kernel, representation_distances
from stagewise.studies.hierarchy.theory.tree import KINDS, Floats
from stagewise.studies.hierarchy.turns import Turns, kind_curves, kind_means, turns_of_kinds

FLIP_TOLERANCE = 0.1
FRACTIONS = (0.05, 0.1, 0.2)
"""Of a branch's final separation, at which its onset may be said to be."""


def transitions(lab: Lab) -> Experiment:
    """Order and times of flips, harmful peaks against branch onsets, and other marks of the stages."""
    branches = branch_curves(lab)
    onsets = [rise(branches.sel(level=k), kind) for k, kind in enumerate(KINDS.values())]
    # The odd part under reflection: the even part is helpful everywhere and would flip curves back at the end.
    window_traces = ReadOnce.of(lab.window_traces)
    instant, window = (bif(traces, part="odd") for traces in (lab.instant_traces, window_traces))
    at_instants = turns_of_kinds(kind_curves(lab, instant), EVERY_TIME, _kernel_means(lab))
    in_windows = turns_of_kinds(kind_curves(lab, window), lab.times, kind_means(lab, lab.matrix(lab.measured_windows)))
    peaks = [turns.peak for turns in in_windows]
    aligned = {
        fraction: alignment(
            peaks,
            [rise(branches.sel(level=k), kind, fraction=fraction) for k, kind in enumerate(KINDS.values())],
            span=(lab.steps[0], LAST),
            match=lambda event: str(event.train),
            axis=np.asarray,
        ).attrs
        for fraction in FRACTIONS
    }
    spectrum, learning = top_eigenvalue_share(window), llc(window_traces, part="even")
    table = _table(at_instants, in_windows, onsets, branches)
    figure = _draw(branches, onsets, curves(kind_curves(lab, window)), spectrum, learning)
    section = Section(
        "Influence events and the model's own stages",
        [Plate("stages", _caption(), figure), embedding(lab, onsets, in_windows), table],
    )
    nearness = f"harmful peaks of the three kinds, onset at {_list(FRACTIONS, '.0%')}"
    checks = [
        _distance_check(lab),
        *(_flip_check(t, kind) for t, kind in zip(at_instants, KINDS.values(), strict=True)),
        *(_peak_check(t, onset) for t, onset in zip(in_windows, onsets, strict=True)),
        Check.reported(f"{nearness}: mean distance in t", [a["statistic"] * RATE for a in aligned.values()], ".2f"),
        Check.reported(f"{nearness}: permutation p", [a["p_value"] for a in aligned.values()], ".3f"),
    ]  # fmt: skip
    findings = [_order(at_instants), _nearness(aligned), _marks(spectrum)]
    return Experiment(section, findings, checks, [_branch_claim(at_instants, onsets, branches), _llc_claim(learning)])


def branch_curves(lab: Lab) -> xr.DataArray:
    """How far each level of the tree is separated in the hidden representations: ``(level, step)``."""
    hidden = lab.aligned.representations(slice(0, LAST + 1))
    coords = {"step": range(LAST + 1), "item": lab.items.names}
    labelled = xr.DataArray(hidden, coords, ("step", "item", "unit"))
    return separations(squared_distances(labelled), lab.items.tree.groupings())


def _distance_check(lab: Lab) -> Check:
    modes, strengths = lab.predicted_strengths(lab.aligned, lab.times)
    closed = representation_distances(modes, strengths)
    hidden = lab.aligned.representations(lab.steps)
    measured = ((hidden[:, :, None] - hidden[:, None]) ** 2).sum(-1)
    r = correlation(closed[:, lab.off_diagonal], measured[:, lab.off_diagonal])
    return Check.at_least("distances of hidden representations, closed form vs network: r", r, 0.999)


def _kernel_means(lab: Lab) -> Floats:
    modes, strengths = lab.predicted_strengths(lab.aligned, EVERY_TIME)
    return kind_means(lab, -gradient_kernel(modes, strengths))


def _order(at_instants: Sequence[Turns]) -> str:
    sampled = [f"t = {t.flip.step * RATE:.2f} ({kind})" for t, kind in zip(at_instants, KINDS.values(), strict=True)]
    truth = [f"{t.true_flip:.2f}" for t in at_instants]
    return (
        f"Influence turns from helpful to harmful coarse to fine: at {words.enumeration(sampled)} by sampling, at "
        f"{words.enumeration(truth)} by theory."
    )


def _nearness(aligned: Mapping[float, Mapping[str, Any]]) -> str:
    middle = aligned[FRACTIONS[1]]
    return (
        "Influence between the pairs of a kind is most harmful near the onset of the branch that parts them: mean "
        f"distance {middle['statistic'] * RATE:.2f} in t, where the same three peaks, shifted together to a random "
        f"time, have a median of {middle['null_median'] * RATE:.2f}. Permutation p over such shifts, for an onset at "
        f"{_list(FRACTIONS, '.0%')} of the separation: {_list((a['p_value'] for a in aligned.values()), '.3f')}."
    )


def _list(values: Iterable[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def _marks(spectrum: xr.Dataset) -> str:
    peaks = [turn for turn in extrema(spectrum[["share", "stderr"]].rename(share="value")) if turn.kind == "maximum"]
    where = (
        f"is largest at t = {_list((RATE * turn.step for turn in peaks), '.2f')}"
        if peaks
        else "has no maximum beyond noise"
    )
    return (
        "A mark of the transitions that needs no ground truth: the share of the top eigenvalue of the centred "
        f"influence matrix {where}."
    )


def _branch_claim(at_instants: Sequence[Turns], onsets: Sequence[Transition], branches: xr.DataArray) -> Claim:
    pairs = enumerate(zip(at_instants, onsets, strict=True))
    open_at_peak = [f"{_opened(branches, level, turns.true_peak, onset):.0%}" for level, (turns, onset) in pairs]
    return Claim(
        "Branches of the representations coincide with extrema of influence",
        f"Extrema come early in a branch: at the harmful peak of the gradient kernel it is {', '.join(open_at_peak)} "
        f"open ({', '.join(KINDS.values())}). State the threshold when branches are said to coincide with peaks.",
    )


def _llc_claim(learning: xr.Dataset) -> Claim:
    turns = [RATE * turn.step for turn in extrema(learning)]
    return Claim(
        "Zeros of the local learning coefficient's derivative mark the boundaries of stages",
        f"It turns at t = {_list(turns, '.2f')}." if turns else "It has no turn: no boundary is marked here.",
    )


def _opened(branches: xr.DataArray, level: int, time: float, onset: Transition) -> float:
    """How far a branch is open at a time, as a fraction of its final separation."""
    return float(branches.isel(level=level).interp(step=time / RATE)) / onset.detail["final"]


def _flip_check(turns: Turns, kind: str) -> Check:
    flip, lower, upper = (RATE * step for step in (turns.flip.step, turns.flip.lower, turns.flip.upper))
    what = f"sign flip of {kind} pairs: t [95% interval]"
    return Check.near(what, flip, turns.true_flip, FLIP_TOLERANCE, ".2f", (lower, upper))


def _peak_check(turns: Turns, onset: Transition) -> Check:
    what = f"harmful peak of a window (sampled) of {onset.name} pairs: t, in the 5–20% onset band"
    return Check.between(what, RATE * turns.peak.step, RATE * onset.lower, RATE * onset.upper, ".2f")


def _table(
    at_instants: Sequence[Turns], in_windows: Sequence[Turns], onsets: Sequence[Transition], branches: xr.DataArray
) -> Table:
    rows = []
    for k, onset in enumerate(onsets):
        for name, turns in (("at an instant", at_instants[k]), ("of a window", in_windows[k])):
            opened = _opened(branches, k, turns.true_peak, onset)
            cells = [_when(turns.flip), f"{turns.true_flip:.2f}", _when(turns.peak), f"{turns.true_peak:.2f}"]
            band = f"{RATE * onset.lower:.2f}, {RATE * onset.step:.2f}, {RATE * onset.upper:.2f}"
            rows.append([onset.name, name, *cells, band, f"{opened:.0%}"])
    columns = [
        "Pairs", "Influence", "Flip, sampled", "in truth", "Harmful peak, sampled", "in truth",
        "Branch opens 5, 10, 20% at", "open at the true peak",
    ]  # fmt: skip
    title = (
        "When influence turns, in t, with 95% intervals. In truth: the gradient kernel in closed form (at an instant), "
        "and items left out in windows that begin then (of a window)"
    )
    return Table(title, columns, rows, frozenset({"Pairs", "Influence"}))


def _when(event: Event) -> str:
    return f"{RATE * event.step:.2f} [{RATE * event.lower:.2f}, {RATE * event.upper:.2f}]"


def _caption() -> str:
    return (
        "The stages, seen four ways. Separation of each level of the tree in the hidden representations, with the band "
        "in which 5 to 20% of it is open; influence between a mean pair of each kind (sampled, window of 0.1), whose "
        "harmful peak falls into the band of its own branch; the share of the top eigenvalue in the centred influence "
        "matrix, high while one transition rules; and the local learning coefficient of the same draws. Bands around "
        "lines are 95% intervals."
    )


@style.styled
def _draw(
    branches: xr.DataArray,
    onsets: Sequence[Transition],
    kinds: xr.Dataset,
    spectrum: xr.Dataset,
    learning: xr.Dataset,
) -> Figure:
    figure = style.canvas(6.4)
    opening, influence, share, llc_ax = figure.subplots(4, 1, sharex=True, height_ratios=[1, 1.3, 0.8, 0.8])
    colours = dict(zip(KINDS.values(), drawing.LEVEL_COLOURS.values(), strict=True))
    for k, onset in enumerate(onsets):
        colour = colours[onset.name]
        opening.plot(EVERY_TIME, branches.isel(level=k) / onset.detail["final"], color=colour, label=onset.name)
        for ax in (opening, influence, share, llc_ax):
            drawing.band(ax, RATE * onset.lower, RATE * onset.upper, colour)
        curve = kinds.sel(train=onset.name, query="mean pair")
        times = RATE * curve["step"].values
        influence.fill_between(times, curve["lower"], curve["upper"], color=colour, alpha=0.25, linewidth=0)
        influence.plot(times, curve["value"], color=colour)
    for ax, dataset, variable in ((share, spectrum, "share"), (llc_ax, learning, "value")):
        times, values, doubt = RATE * dataset["step"].values, dataset[variable].values, 1.96 * dataset["stderr"].values
        ax.fill_between(times, values - doubt, values + doubt, color=style.MUTED, alpha=0.3, linewidth=0)
        ax.plot(times, values, color=style.INK, linewidth=1.2)
    drawing.time_axis(influence, EVERY_TIME)
    titles = ("separation of representations", "influence (negative = helpful)", "share of the top eigenvalue", "LLC")
    for ax, title in zip((opening, influence, share, llc_ax), titles, strict=True):
        ax.set_title(title)
    opening.legend(frameon=False, loc="upper left")
    llc_ax.set_xlabel(drawing.TIME)
    return figure
