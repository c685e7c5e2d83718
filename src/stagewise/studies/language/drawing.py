"""What the study's figures share: colours of classes, and the network's own stages on an axis of steps."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes

from stagewise.dynamics.stages import Transition
from stagewise.reporting import style
from stagewise.studies.language.classes import CLASSES

CLASS_COLOURS = style.colours(CLASSES)


def mark(ax: Axes, transitions: Iterable[Transition]) -> None:
    """Bands of transitions, with a line at each."""
    for one in transitions:
        ax.axvspan(one.lower, one.upper, color=style.MUTED, alpha=0.1, linewidth=0, zorder=0)
        ax.axvline(one.step, color=style.MUTED, linewidth=0.8, linestyle=":", zorder=1)
