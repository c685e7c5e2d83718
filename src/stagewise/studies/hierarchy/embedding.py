"""The hidden representations of the items unfolding over training, in one fixed frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from stagewise.dynamics.stages import Transition
from stagewise.reporting import style
from stagewise.reporting.page import Plate
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.settings import EVERY_TIME, LAST, RATE
from stagewise.studies.hierarchy.theory.tree import Floats
from stagewise.studies.hierarchy.turns import Turns

_EVERY = 10


def embedding(lab: Lab, onsets: Sequence[Transition], turns: Sequence[Turns]) -> Plate:
    """Two-dimensional scaling of all (item, time) pairs jointly, and the tree unfolding along one direction."""
    hidden = lab.aligned.representations(list(range(0, LAST + 1, _EVERY)))
    # Classical scaling of Euclidean distances is principal components of the points.
    scaling = PCA(2)
    points = scaling.fit_transform(hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], 2)
    caption = (
        "Hidden representations of the items unfold as the tree does. Left: classical multidimensional scaling of all "
        f"items and times together, from one point at t = 0 to the names at t = 8; the plane holds "
        f"{scaling.explained_variance_ratio_.sum():.0%} of the spread, and siblings part outside of it. Right: the "
        "direction along which the items end in their order, against time. Circles: onset of a branch, the separation "
        "of its level at 10% of its final value, with its 5–20% band. Triangles: when influence between the items that "
        "it parts is most harmful: as the branch begins to open, well before it is half open."
    )
    marks = {"o": [RATE * onset.step for onset in onsets], "^": [RATE * of_kind.peak.step for of_kind in turns]}
    bands = [(RATE * onset.lower, RATE * onset.upper) for onset in onsets]
    return Plate("embedding", caption, _draw(lab, points, _unfolded(hidden), marks, bands))


def _unfolded(hidden: Floats) -> Floats:
    """Projections ``(step, item)`` on the direction along which the items end evenly spaced in their order."""
    order = np.arange(hidden.shape[1]) - (hidden.shape[1] - 1) / 2
    direction = np.linalg.lstsq(hidden[-1], order, rcond=None)[0]
    projections: Floats = hidden @ direction
    return projections


@style.styled
def _draw(
    lab: Lab, points: Floats, unfolded: Floats, marks: dict[str, list[float]], bands: list[tuple[float, float]]
) -> Figure:
    figure = style.canvas(4.2)
    plane, tree = figure.subplots(1, 2, width_ratios=[1, 1.5])
    times = EVERY_TIME[::_EVERY]
    colour = style.colours(lab.items.names)
    for item, name in enumerate(lab.items.names):
        plane.plot(points[:, item, 0], points[:, item, 1], color=colour[name], linewidth=1.3)
        tree.plot(times, unfolded[:, item], color=colour[name], linewidth=1.3)
        for marker, moments in marks.items():
            at = [int(np.abs(times - moment).argmin()) for moment in moments]
            look = {"color": colour[name], "markerfacecolor": "white", "markersize": 4}
            plane.plot(points[at, item, 0], points[at, item, 1], marker, **look)
            tree.plot(times[at], unfolded[at, item], marker, **look)
    _name_ends(plane, lab.items.names, points[-1])
    plane.set_aspect("equal", "datalim")
    plane.margins(0.15)
    plane.set_xlabel("axis 1")
    plane.set_ylabel("axis 2")
    for (lower, upper), tint in zip(bands, drawing.LEVEL_COLOURS.values(), strict=True):
        drawing.band(tree, lower, upper, tint)
    drawing.time_axis(tree, times, zero=False)
    tree.set_yticks([])
    tree.set_xlabel(drawing.TIME)
    style.end_labels(tree, [(times[-1], unfolded[-1, k], n, colour[n]) for k, n in enumerate(lab.items.names)], 3.4)
    return figure


def _name_ends(ax: Axes, names: Sequence[str], ends: Floats) -> None:
    """Name the ends of the paths, one text for those that coincide."""
    left = list(range(len(names)))
    while left:
        near = [k for k in left if np.abs(ends[k] - ends[left[0]]).max() < 1e-2]
        up = ends[near[0], 1] > 0
        look: dict[str, Any] = {"ha": "center", "va": "bottom" if up else "top", "textcoords": "offset points"}
        ax.annotate(", ".join(names[k] for k in near), ends[near[0]], (0, 5 if up else -5), **look)
        left = [k for k in left if k not in near]
