"""Curves that coincide because the tree is symmetric, and the same curves on a tree that is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.reporting import style
from stagewise.reporting.page import Plate, Section
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import measured_influence
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import Lab, correlation, matrix
from stagewise.studies.hierarchy.network import Run, optimizer, record, task
from stagewise.studies.hierarchy.settings import RATE, WINDOW
from stagewise.studies.hierarchy.theory.kernels import gradient_kernel
from stagewise.studies.hierarchy.theory.modes import Modes, mixed_strengths
from stagewise.studies.hierarchy.theory.tree import LOPSIDED, Floats, Items

FROM, ONTO = "dog", "plant"


def symmetry(lab: Lab) -> Experiment:
    """Influence of a dog on every plant, on the balanced tree and on a lopsided one."""
    lopsided = Items.of(LOPSIDED)
    trees = {"balanced tree": lab.items, "lopsided tree": lopsided}
    steps = lab.settings.symmetry_steps
    runs = {name: _run(items, steps) for name, items in trees.items()}
    measured = {name: _measured(items, runs[name]) for name, items in trees.items()}
    spread = {name: _spread(items, measured[name]) for name, items in trees.items()}
    off = lopsided.tree.split_level() > 0
    kernel = _kernel(lopsided, runs["lopsided tree"], RATE * (np.array(steps) + WINDOW / 2))
    checks = [
        Check.at_most("balanced tree: dog on all plants, largest difference / largest influence",
                      spread["balanced tree"], 1e-6, ".0e"),
        Check.reported("lopsided tree: dog on all plants, largest difference / largest influence",
                       spread["lopsided tree"], ".2f"),
        Check.at_least("lopsided tree, window ablation vs gradient kernel, off-diagonal: r",
                       correlation(kernel[:, off], measured["lopsided tree"][:, off]), 0.99),
    ]  # fmt: skip
    claim = Claim(
        "A dog's influence on every plant is one and the same curve",
        "True of the balanced tree, whose symmetries exchange the plants. On a lopsided tree the curves differ by "
        f"{spread['lopsided tree']:.0%} of the largest value.",
    )
    caption = (
        "Influence of “dog” on every plant (and on “stone”, which has no neighbours), by leaving it out in windows of "
        "0.1 (dots), and by the gradient kernel in closed form (thin). Left: on the balanced tree the four curves are "
        "one. Right: on a lopsided tree those of the two trees and of the three flowers part; within a kind they are "
        "still one."
    )
    plate = Plate("symmetry", caption, _draw(trees, runs, measured))
    return Experiment(Section("Symmetric and lopsided trees", [plate]), [], checks, [claim])


def _run(items: Items, steps: Sequence[int]) -> Run:
    return record(task(items, start="aligned"), optimizer(items, "sgd", RATE), steps[-1], steps)


def _measured(items: Items, run: Run) -> Floats:
    """Influence by leaving items out in windows from every checkpoint: ``(step, train, query)``."""
    effects = window_ablation(run.task, run.trajectory, window=WINDOW, weight=0.0, order=run.order)
    return matrix(items, measured_influence(effects))


def _kernel(items: Items, run: Run, times: Floats) -> Floats:
    """Minus the gradient kernel over a window, ``(time, train, query)``."""
    modes = Modes.of(items.white_targets())
    first, second = run.layers([0])
    return -RATE * WINDOW * gradient_kernel(modes, mixed_strengths(modes.s, modes.initial(first[0], second[0]), times))


def _onto(items: Items) -> list[int]:
    kingdom = items.tree.groupings()[0]
    return [k for k, name in enumerate(kingdom) if name == ONTO]


def _spread(items: Items, influence: Floats) -> float:
    """Largest difference between the curves of FROM on all of ONTO, over their largest magnitude."""
    curves = influence[:, items.names.index(FROM)][:, _onto(items)]
    return float((curves.max(1) - curves.min(1)).max() / np.abs(curves).max())


@style.styled
def _draw(trees: dict[str, Items], runs: dict[str, Run], measured: dict[str, Floats]) -> Figure:
    figure = style.canvas(3.2)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (name, items) in zip(axes, trees.items(), strict=True):
        _curves(ax, items, runs[name], measured[name])
        ax.set_title(name)
    style.name_axes(figure, drawing.TIME, "influence of “dog” (nats; negative = helpful)")
    return figure


def _curves(ax: Axes, items: Items, run: Run, measured: Floats) -> None:
    steps = np.array(run.trajectory.steps)
    times, centres = RATE * steps, RATE * (steps + WINDOW / 2)
    kernel = _kernel(items, run, times)
    drawing.time_axis(ax, times)
    curves, source = measured[:, items.names.index(FROM)], items.names.index(FROM)
    shown = [*_onto(items), *(k for k, name in enumerate(items.names) if name == "stone")]
    for group, tint in zip(_alike(curves, shown), drawing.LEVEL_COLOURS.values(), strict=False):
        names = ", ".join(items.names[k] for k in group)
        ax.plot(times, kernel[:, source, group[0]], color=tint, linewidth=0.7)
        ax.plot(centres, curves[:, group[0]], ".-", color=tint, markersize=3, linewidth=0.9, label=f"→ {names}")
    ax.legend(frameon=False, loc="upper right")


def _alike(curves: Floats, queries: list[int]) -> list[list[int]]:
    """The queries in groups whose curves coincide."""
    groups: list[list[int]] = []
    for query in queries:
        same = [g for g in groups if np.abs(curves[:, g[0]] - curves[:, query]).max() < 1e-6 * np.abs(curves).max()]
        if same:
            same[0].append(query)
        else:
            groups.append([query])
    return groups
