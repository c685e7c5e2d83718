"""The map of the samples over training: small multiples, one per step, in one frame."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.reporting import style, words

_COLUMNS = 3, 4


@style.styled
def sample_map(positions: xr.Dataset) -> Figure:
    """Samples as dots of the colour of their label, at every step.

    Args:
        positions: ``value`` and perhaps ``stderr`` ``(step, sample, axis)`` of two axes and ``share`` ``(step, axis)``
            with the coordinate ``label (sample)``, see :func:`stagewise.influence_map`. The cross in a corner has the
            median standard error of the step on either side.
    """
    steps, labels = positions["step"].values.tolist(), positions["label"].values
    names = sorted(set(labels.tolist()), key=lambda name: (len(name), name) if name.isdecimal() else (0, name))
    columns = int(np.clip(len(steps), *_COLUMNS))
    rows = -(-len(steps) // columns)
    figure = style.canvas(style.WIDTH / columns * rows + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colour = style.colours(names)
    reach = 1.08 * float(np.abs(positions["value"]).max()) or 1.0
    for ax, step in zip(axes.ravel(), steps, strict=False):
        at = positions.sel(step=step).transpose("sample", "axis")
        for name in names:
            x, y = at["value"].values[labels == name].T
            ax.plot(x, y, ".", color=colour[name], markersize=4, alpha=0.7, markeredgewidth=0, label=name)
        _look(ax, reach)
        ax.set_title(f"step {words.step_number(step)}: {float(at['share'].sum()):.0%}")
        if "stderr" in at:
            _cross(ax, reach, *np.median(at["stderr"].values, 0))
    style.empty_axes_off(axes, len(steps))
    handles = [ax for ax in axes[0, 0].lines if ax.get_label() in names]
    shown = [words.label_text(name, 14) or "no label" for name in names]
    figure.legend(handles, shown, loc="outside lower center", ncols=10, frameon=False, markerscale=2, handletextpad=0)
    return figure


def _look(ax: Axes, reach: float) -> None:
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    ax.set_xticks([0])
    ax.set_yticks([0])
    ax.grid(color=style.FAINT, linewidth=0.5)
    ax.tick_params(labelbottom=False, labelleft=False, length=0)


def _cross(ax: Axes, reach: float, across: float, up: float) -> None:
    corner = -0.96 * reach
    ax.errorbar([corner + across], [corner + up], [up], [across], color=style.INK, linewidth=0.8, label="error")
