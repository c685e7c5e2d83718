"""What is learnt, and when: the modes of the data, by theory and by training."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from stagewise.reporting import style
from stagewise.reporting.page import Plate, Section
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import Lab, correlation
from stagewise.studies.hierarchy.network import Run
from stagewise.studies.hierarchy.settings import EVERY_TIME, LAST
from stagewise.studies.hierarchy.theory.modes import Modes, half_rise
from stagewise.studies.hierarchy.theory.tree import Floats


def learning(lab: Lab) -> Experiment:
    """Mode strengths of both runs against the closed form."""
    times = EVERY_TIME
    checks, measured = [], {}
    for run, start, bound in ((lab.aligned, "aligned", 0.999), (lab.random, "random", 0.998)):
        modes, predicted = lab.predicted_strengths(run, times)
        measured[start] = measured_strengths(run, modes)[: LAST + 1]
        closed = np.diagonal(predicted, axis1=1, axis2=2)
        worst = min(correlation(a, b) for a, b in zip(measured[start].T, closed.T, strict=True))
        checks.append(
            Check.at_least(f"mode curves, theory vs training, {start} start: least r of a mode", worst, bound, ".5f")
        )
    modes, predicted = lab.predicted_strengths(lab.random, times)
    rises = half_rise(modes.s, np.diagonal(lab.predicted_strengths(lab.aligned, times[:1])[1][0]))
    # Modes of equal strength rise together, but for rounding.
    rise_times = Check.reported("modes rise half-way, closed form: t of every level", np.unique(rises.round(6)), ".2f")
    checks.append(rise_times)
    finding = (
        "The network learns its tree coarse to fine: the modes of the data rise half-way at t = "
        f"{rise_times.text}, as the closed form says."
    )
    caption = (
        "The data, and what is learnt of them when. Left: which item has which feature. Middle: the modes of the data, "
        "rows by strength s: all items, animals against plants, kinds of a kingdom, items of a kind. Right: the "
        "strength of every mode during training from random weights (dots) and in closed form (lines): each level of "
        "the tree is a stage of its own."
    )
    figure = _draw(lab, modes, times, measured["random"], np.diagonal(predicted, axis1=1, axis2=2))
    return Experiment(Section("Stages of learning", [Plate("stages-of-learning", caption, figure)]), [finding], checks)


def measured_strengths(run: Run, modes: Modes) -> Floats:
    """Diagonal of U^T W2 W1 V at every step: ``(step, mode)``."""
    first, second = run.layers()
    strengths: Floats = np.einsum("tkh,thk->tk", modes.u.T @ second, first @ modes.v)
    return strengths


@style.styled
def _draw(lab: Lab, modes: Modes, times: Floats, measured: Floats, predicted: Floats) -> Figure:
    figure = style.canvas(3.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.8])
    nodes = [node.name for node in lab.items.tree.nodes]
    left.imshow(lab.items.targets.T, cmap="Greys", vmax=1.6, aspect="auto", interpolation="none")
    left.set_yticks(range(len(nodes)), nodes)
    left.set_title("features of the items")
    limit = np.abs(modes.v).max()
    middle.imshow(modes.v.T, cmap=style.DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    middle.set_yticks(range(len(modes.s)), [f"s = {s:.2f}" for s in modes.s])
    middle.set_title("modes")
    for ax in (left, middle):
        ax.set_xticks(range(len(lab.items.names)), lab.items.names, rotation=90)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    colours = [style.INK, *(drawing.LEVEL_COLOURS[level] for level in (1, 2, 2, 3, 3, 3, 3))]
    every = slice(None, None, 80)
    for mode, colour in enumerate(colours):
        right.plot(times, predicted[:, mode], color=colour, linewidth=1.2)
        right.plot(times[every], measured[every, mode], ".", color=colour, markersize=4)
    drawing.time_axis(right, times, zero=False)
    right.set_title("strength of the modes")
    right.set_xlabel(drawing.TIME)
    return figure
