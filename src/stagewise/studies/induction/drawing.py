"""What the study's figures share: colours of classes, an axis of steps, and the transition."""

from __future__ import annotations

from matplotlib.axes import Axes

from stagewise.dynamics.stages import Transition

STEPS = "training step"
CLASS_COLOURS = {"induction": "#2a35b0", "against": "#cc4788", "neither": "#666619", "early": "#46a2d0"}
BAND = "#8a8a8a"


def step_axis(ax: Axes, last: int, zero: bool = False) -> None:
    """Steps from 0 to the last, and perhaps the line at zero influence."""
    ax.set_xlim(0, last)
    if zero:
        ax.axhline(0, color="#9a9a9a", linewidth=0.7, zorder=1)


def mark(ax: Axes, transition: Transition | None) -> None:
    """The transition, shaded, with a line at its onset."""
    if transition is not None:
        ax.axvspan(transition.lower, transition.upper, color=BAND, alpha=0.13, linewidth=0, zorder=0)
        ax.axvline(transition.step, color=BAND, linewidth=0.8, linestyle=":", zorder=1)
