"""What the study's figures share: a linear axis of training time, colours of the kinds of pairs, and marks."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from stagewise.reporting import style
from stagewise.studies.hierarchy.theory.tree import Floats

TIME = "training time t = step × learning rate"
LEVEL_COLOURS = {1: "#cc4788", 2: "#46a2d0", 3: "#2a35b0"}
"""Pairs that part on level 1 (the coarsest), 2 and 3."""


def time_axis(ax: Axes, times: Floats | Sequence[float], zero: bool = True) -> None:
    """Linear time from the first to the last, and perhaps the line at zero influence."""
    ax.set_xlim(min(times), max(times))
    if zero:
        ax.axhline(0, color="#9a9a9a", linewidth=0.7, zorder=1)


def band(ax: Axes, lower: float, upper: float, colour: str) -> None:
    """A span of time, shaded."""
    ax.axvspan(lower, upper, color=colour, alpha=0.13, linewidth=0, zorder=0)


def scaled(curve: Floats) -> Floats:
    """A curve divided by its largest magnitude: shapes of different units on one axis."""
    return curve / max(float(abs(curve).max()), 1e-300)


def label_ends(ax: Axes, times: Floats, curves: Sequence[tuple[Floats, str, str]], height: float) -> None:
    """Name curves (values, text, colour) at their right ends."""
    style.end_labels(ax, [(times[-1], values[-1], text, colour) for values, text, colour in curves], height)
