"""What the study's figures share: colours of classes, and an axis of steps."""

from __future__ import annotations

from matplotlib.axes import Axes

STEPS = "training step"
CLASS_COLOURS = {"induction": "#2a35b0", "against": "#cc4788", "neither": "#666619", "early": "#46a2d0"}


def step_axis(ax: Axes, last: int, zero: bool = False) -> None:
    """Steps from 0 to the last, and perhaps the line at zero influence."""
    ax.set_xlim(0, last)
    if zero:
        ax.axhline(0, color="#9a9a9a", linewidth=0.7, zorder=1)
