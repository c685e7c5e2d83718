"""Influence in two times as a triangle: when data were trained on, against when the model was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import AsinhNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

from stagewise.dynamics.events import Event
from stagewise.dynamics.stages import Transition
from stagewise.reporting import style, words

Floats = NDArray[np.float64]

# Of the largest magnitude, below which colour is linear and above logarithmic: a lesson fades over orders of magnitude.
_LINEAR = 0.02


@style.styled
def time_triangle(influence: xr.Dataset, train: Any, query: Any, stages: Sequence[Transition | Event] = ()) -> Figure:
    """Influence of one train group on one query, from when it was trained on (across) to when it was asked (up).

    Args:
        influence: in two times, see :func:`stagewise.retraining.two_times.influence_in_time`.
        train: label of the train group.
        query: label of the query.
        stages: what happened to the model or to influence, drawn as lines at its step on both axes.
    """
    figure = style.canvas(5.6, 6.6)
    ax = figure.subplots()
    pair = influence.sel(train=train, query=query)
    limit = largest(pair)
    mesh = draw_triangle(ax, pair, limit)
    across, up = edges(pair)
    style.step_axes(ax, [*across, *up])
    mark_stages(ax, [(stage.step, _name(stage)) for stage in stages])
    ax.set_title(f"{words.quoted(train)} on {words.quoted(query)}")
    ax.set_xlabel(f"trained on at: {style.STEPS}")
    ax.set_ylabel(f"asked at: {style.STEPS}")
    colour_bar(figure, [ax], mesh, limit)
    return figure


def draw_triangle(ax: Axes, pair: xr.Dataset, limit: float) -> QuadMesh:
    """The cells of one pair; hatched where a number is masked, empty where the question came first.

    Args:
        ax: the panel.
        pair: ``value`` ``(trained, asked)`` with the coordinate ``trained_stop``, in any unit of time.
        limit: the magnitude at which colours are fullest.
    """
    value = pair["value"].transpose("asked", "trained").values
    across, up = edges(pair)
    later = pair["trained"].values[None, :] >= pair["asked"].values[:, None]
    norm = AsinhNorm(_LINEAR * limit, -limit, limit)
    mesh = ax.pcolormesh(
        across, up, np.ma.masked_array(value, later | np.isnan(value)), cmap=style.DIVERGING, norm=norm
    )
    failed = np.isnan(value) & ~later
    if failed.any():
        grey = ListedColormap([style.SHADE])
        cells = np.ma.masked_array(np.zeros(value.shape), ~failed)
        ax.pcolor(across, up, cells, cmap=grey, hatch="////", edgecolor=style.MUTED, linewidth=0, label="masked")
    ax.set_aspect("equal")
    return mesh


def edges(pair: xr.Dataset) -> tuple[Floats, Floats]:
    """Where cells end, across and up: a row reaches back to the question before, the first to the first bin."""
    trained, asked = pair["trained"].values, pair["asked"].values
    across = np.append(trained, pair["trained_stop"].values[-1]).astype(float)
    return across, np.append(across[0], asked).astype(float)


def largest(influence: xr.Dataset) -> float:
    """The largest magnitude that is not masked; 1 if there is none."""
    return float(np.nan_to_num(np.abs(influence["value"].values)).max(initial=0.0)) or 1.0


def mark_stages(ax: Axes, stages: Sequence[tuple[float, str]]) -> None:
    """Lines at (time, name) from both axes to the diagonal, named below it, where the triangle is empty."""
    for time, name in stages:
        ax.plot([ax.get_xlim()[0], time], [time, time], color=style.INK, linewidth=0.7, alpha=0.6)
        ax.plot([time, time], [time, ax.get_ylim()[1]], color=style.INK, linewidth=0.7, alpha=0.6, label="stage")
        if not name:
            continue
        along = (ax.transScale + ax.transLimits).transform((time, time))[0]
        placed: dict[str, Any] = {"xytext": (5, -8), "textcoords": "offset points", "fontsize": 8, "color": style.MUTED}
        # Whichever side of the corner has more room: to the right early, downwards late.
        placed |= {"ha": "left", "va": "top"} if along < 0.5 else {"ha": "center", "va": "top", "rotation": 90}
        placed["bbox"] = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        ax.annotate(words.label_text(name, 24), (time, time), **placed)


def colour_bar(figure: Figure, axes: Sequence[Axes], mesh: QuadMesh, limit: float) -> None:
    """The scale of influence beside some panels: linear near zero, logarithmic beyond."""
    scale, unit = style.unit(limit, "nats per unit weight in a bin")
    bar = figure.colorbar(mesh, ax=list(axes), fraction=0.05, pad=0.02, aspect=30)
    ticks = [side * part * limit for side in (-1, 1) for part in (1, 0.3, 0.1, 0.03)]
    bar.ax.yaxis.set_major_locator(FixedLocator([0.0, *ticks]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:.2g}".replace("-", "−")))
    bar.outline.set_visible(False)
    bar.set_label(unit)
    end: dict[str, Any] = {"transform": bar.ax.transAxes, "ha": "center", "fontsize": 8}
    bar.ax.text(0.5, 1.03, "harmful", va="bottom", color=style.HARMFUL, **end)
    bar.ax.text(0.5, -0.03, "helpful", va="top", color=style.HELPFUL, **end)


def _name(stage: Transition | Event) -> str:
    return stage.name if isinstance(stage, Transition) else stage.kind
