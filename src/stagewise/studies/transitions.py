"""Transitions of a network in the figures of studies."""

from __future__ import annotations

from matplotlib.axes import Axes

from stagewise.dynamics.stages import Transition

BAND = "#8a8a8a"


def mark(ax: Axes, transition: Transition | None) -> None:
    """The transition, shaded, with a line at its onset."""
    if transition is not None:
        ax.axvspan(transition.lower, transition.upper, color=BAND, alpha=0.13, linewidth=0, zorder=0)
        ax.axvline(transition.step, color=BAND, linewidth=0.8, linestyle=":", zorder=1)
