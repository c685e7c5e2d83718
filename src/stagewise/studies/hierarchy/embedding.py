"""The hidden representations of the items unfolding over training, in one fixed frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from stagewise.dynamics.stages import Transition
from stagewise.report import style
from stagewise.report.page import Plate
from stagewise.studies.hierarchy.lab import EVERY_TIME, LAST, RATE, Lab
from stagewise.studies.hierarchy.timing import Timing
from stagewise.studies.hierarchy.tree import Floats

_EVERY = 10


def embedding(lab: Lab, onsets: Sequence[Transition], timings: Sequence[Timing]) -> Plate:
    """Two-dimensional scaling of all (item, time) pairs jointly, with branch onsets and harmful peaks."""
    steps = list(range(0, LAST + 1, _EVERY))
    hidden = lab.aligned.representations(steps)
    # Classical scaling of Euclidean distances is principal components of the points.
    scaling = PCA(4)
    points = scaling.fit_transform(hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], 4)
    shown = scaling.explained_variance_ratio_
    caption = (
        "Hidden representations of the items from t = 0 (all at one point) to t = 8 (names), by classical scaling of "
        f"all items and times together; the four axes hold {shown.sum():.0%} of the spread. "
        "Circles: onset of each branch, the separation of that level at 10% of its final value. Triangles: the most "
        "harmful moment between the items that it separates. Influence is most harmful where a branch begins to open, "
        "well before it is half open."
    )
    marks = {"o": [RATE * onset.step for onset in onsets], "^": [RATE * timing.harm.step for timing in timings]}
    return Plate("embedding", caption, _draw(lab, points, marks))


@style.styled
def _draw(lab: Lab, points: Floats, marks: dict[str, list[float]]) -> Figure:
    figure = style.canvas(4.2)
    axes = figure.subplots(1, 2)
    colour = style.colours(lab.items.names)
    times = EVERY_TIME[::_EVERY]
    for ax, (x, y) in zip(axes, ((0, 1), (2, 3)), strict=True):
        for item, name in enumerate(lab.items.names):
            path = points[:, item]
            ax.plot(path[:, x], path[:, y], color=colour[name], linewidth=1.3)
            ax.annotate(name, path[-1, [x, y]], xytext=(4, 2), textcoords="offset points", color=colour[name])
            for marker, moments in marks.items():
                at = path[[int(np.abs(times - moment).argmin()) for moment in moments]]
                ax.plot(at[:, x], at[:, y], marker, color=colour[name], markerfacecolor="white", markersize=4)
        ax.set_xlabel(f"axis {x + 1}")
        ax.set_ylabel(f"axis {y + 1}")
        ax.set_aspect("equal", "datalim")
    return figure
