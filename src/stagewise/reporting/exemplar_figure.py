"""Single training samples that mattered most for one query, as images over training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from stagewise.reporting import style, words
from stagewise.results import Exemplar

PER_SIDE = 5
_GAP, _CAPTION, _MIDDLE, _HEAD, _NAME = 0.35, 0.62, 0.6, 0.7, 1.5
"""In widths of an image: between images, text under one, between helpful and harmful, title, name of a row."""


@style.styled
def exemplar_grid(exemplars: Sequence[Exemplar]) -> Figure:
    """One row per step: the most helpful training samples on the left, the most harmful on the right.

    Args:
        exemplars: of one query, all with images. Under each image stand its label and value ± standard error, in the
            unit that the axis title names.
    """
    values = np.concatenate([np.asarray(exemplar.values, dtype=float) for exemplar in exemplars])
    scale, unit = style.unit(values, "nats per unit weight", plain=0.1)
    pitch, row_height = 1 + _GAP, 1 + _CAPTION
    right, bottom = 2 * PER_SIDE * pitch + _MIDDLE, len(exemplars) * row_height
    figure = Figure(figsize=(style.WIDTH, style.WIDTH * (bottom + _HEAD) / (right + _NAME)))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(-_NAME, right), ylim=(bottom, -_HEAD))
    for row, exemplar in enumerate(sorted(exemplars, key=lambda e: e.step)):
        helpful, harmful = extremes(exemplar)
        places = [*enumerate(helpful), *((2 * PER_SIDE - 1 - k, sample) for k, sample in enumerate(harmful))]
        for column, sample in places:
            left = column * pitch + (_MIDDLE if column >= PER_SIDE else 0)
            _tile(ax, exemplar, sample, left, row * row_height, scale)
        step = f"step {words.step_number(exemplar.step)}"
        ax.text(-0.3, row * row_height + 0.5, step, ha="right", va="center", weight="bold")
    ax.text(0, -0.3, f"← most helpful ({unit})", color=style.HELPFUL, weight="bold")
    ax.text(right - _GAP, -0.3, "most harmful →", color=style.HARMFUL, weight="bold", ha="right")
    ax.set_axis_off()
    return figure


def extremes(exemplar: Exemplar) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Positions of the most helpful and of the most harmful samples, the strongest first, at most five each."""
    values = np.asarray(exemplar.values, dtype=float)
    order = np.argsort(values, kind="stable")
    return order[values[order] < 0][:PER_SIDE], order[::-1][values[order[::-1]] > 0][:PER_SIDE]


def _tile(ax: Axes, exemplar: Exemplar, sample: int, left: float, top: float, scale: float) -> None:
    if exemplar.images is None:
        raise ValueError(f"the exemplars of query {exemplar.query!r} have no images; show them as a table")
    value, stderr = exemplar.values[sample], exemplar.stderrs[sample]
    colour = style.HELPFUL if value < 0 else style.HARMFUL
    ax.imshow(
        exemplar.images[sample],
        extent=(left, left + 1, top + 1, top),
        cmap="gray_r",
        vmin=0,
        vmax=1,
        interpolation="none",
        aspect="auto",
    )
    ax.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor=colour, linewidth=1))
    label = words.label_text(exemplar.labels[sample], 12)
    ax.text(left + 0.5, top + 1.08, label, ha="center", va="top", fontsize=7.5)
    doubt = words.rounded(value / scale, stderr / scale)
    ax.text(left + 0.5, top + 1.27, doubt, ha="center", va="top", fontsize=6.5, color=style.MUTED)
