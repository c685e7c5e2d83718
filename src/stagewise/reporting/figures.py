"""The figures of a report, one function each: a labelled dataset in, a matplotlib figure out.

Nothing here touches pyplot or any other global state; nothing computes what the datasets do not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stagewise.dynamics.curves import curves
from stagewise.dynamics.events import Event
from stagewise.reporting import style, words
from stagewise.results import others

MAX_QUERIES = 12
MAX_CURVES = 4
MAX_MATRICES = 4
MAX_ROWS = 40
_MAX_TICK_LABELS = 40
_WITHOUT_UNIT = {"correlation": "minus correlation of losses", "partial": "minus partial correlation of losses"}


@style.styled
def loss_curves(losses: xr.Dataset, trusted: xr.DataArray | None = None) -> Figure:
    """Mean training loss and mean query losses at the checkpoints, untrusted checkpoints shaded."""
    height = 3.4
    figure = style.canvas(height)
    ax = figure.subplots()
    steps = losses["step"].values
    style.step_axis(ax, steps)
    style.rate_axis(ax, losses)
    style.shade_untrusted(ax, trusted)
    colour = style.colours(losses["query"].values.tolist())
    named = losses.sizes["query"] <= MAX_QUERIES
    ends = []
    for query in losses["query"].values.tolist():
        loss = losses["queries"].sel(query=query).values
        tint = colour[query] if named else style.FAINT
        ax.plot(steps, loss, color=tint, linewidth=1.1, marker="o" if len(steps) == 1 else None, markersize=3)
        ends += [(steps[-1], loss[-1], words.label_text(query), tint)] if named else []
    train = losses["train"].values
    ax.plot(steps, train, color=style.INK, linewidth=2, marker="o", markersize=3.5, zorder=3)
    ends.append((steps[-1], train[-1], "training set", style.INK))
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.grid(axis="y", color=style.FAINT, linewidth=0.5)
    ax.set_xlabel(style.STEPS)
    ax.set_ylabel("mean loss (nats)")
    style.end_labels(ax, ends, height - 0.7)
    return figure


@style.styled
def influence_curves(
    influence: xr.Dataset,
    events: Sequence[Event] = (),
    trusted: xr.DataArray | None = None,
    beside: xr.Dataset | None = None,
    losses: xr.Dataset | None = None,
) -> Figure:
    """Influence over training: one panel per query, in each the train groups that reach furthest.

    Lines are estimates, bands pointwise 95% intervals; diamonds mark sign flips and triangles peaks, with the
    interval in which they lie. Open squares are ``beside``: another estimate, at some of the checkpoints or at others.
    With the ``losses`` of a run whose learning rate changes, the sum of the rates stands above the first row.
    """
    shown = strongest_queries(influence)
    rows, columns = grid(len(shown), 3 if len(shown) > 4 else 2)
    height = 2.15 if rows > 1 else 2.8
    figure = style.canvas(height * rows + 0.3)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
    banded = curves(influence)
    relative = _WITHOUT_UNIT.get(influence.attrs.get("kind", ""))
    pairs = np.where(others(influence), influence["value"].transpose(..., "train", "query"), 0)
    scale, unit = (1.0, "") if relative else style.unit(pairs, "nats per unit weight")
    for ax, query in zip(axes.ravel(), shown, strict=False):
        answered = influence["step"].values
        if beside is not None:
            answered = np.union1d(answered, beside["step"].values)
        style.step_axis(ax, _with_neighbours(answered, trusted))
        style.shade_untrusted(ax, trusted)
        if losses is not None and ax in axes[0]:
            style.rate_axis(ax, losses)
        _influence_panel(ax, banded, query, events, scale, height - 0.55, beside)
        ax.tick_params(labelbottom=True)
    style.empty_axes_off(axes, len(shown))
    middle = " " if rows > 1 else "\n"  # one row is too low for all of it
    named = f"{relative};{middle}negative = helpful" if relative else f"influence ({unit};{middle}negative = helpful)"
    style.name_axes(figure, style.STEPS, named)
    return figure


def _with_neighbours(answered: NDArray[Any], trusted: xr.DataArray | None) -> NDArray[Any]:
    """The steps with influence and one checkpoint on either side, so that a long stretch without takes no room."""
    if trusted is None:
        return answered
    steps = trusted["step"].values
    first, last = np.searchsorted(steps, (answered[0], answered[-1]))
    return np.asarray(steps[max(first - 1, 0) : last + 2])


def strongest_queries(influence: xr.Dataset) -> list[Any]:
    """The queries that are influenced most, at most :data:`MAX_QUERIES`, in the order of the dataset."""
    reach = _reach(influence).max("train")
    kept = np.sort(np.argsort(-reach.values, kind="stable")[:MAX_QUERIES])
    return [influence["query"].values.tolist()[k] for k in kept]


def grid(panels: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a grid that holds so many panels."""
    columns = min(panels, columns)
    return -(-panels // columns), columns


def _reach(influence: xr.Dataset) -> xr.DataArray:
    """The furthest each (train, query) curve gets from zero; 0 for groups with themselves, if there are others."""
    pairs = xr.DataArray(others(influence), dims=("train", "query"))
    return abs(influence["value"]).max("step") * pairs


def _influence_panel(
    ax: Axes,
    banded: xr.Dataset,
    query: Any,
    events: Sequence[Event],
    scale: float,
    height: float,
    beside: xr.Dataset | None,
) -> None:
    labels = banded["train"].values.tolist()
    colour = style.colours(labels)
    column = banded["query"].values.tolist().index(query)
    reach = _reach(banded).isel(query=column).values
    kept = [labels[k] for k in np.argsort(-reach, kind="stable")[:MAX_CURVES] if reach[k] > 0 or len(labels) == 1]
    steps = banded["step"].values
    ax.axhline(0, color="#9a9a9a", linewidth=0.7, zorder=1)
    ends = []
    for label in kept:
        curve = banded.isel(query=column, train=labels.index(label)) / scale
        ax.fill_between(steps, curve["lower"], curve["upper"], color=colour[label], alpha=0.15, linewidth=0)
        ax.plot(steps, curve["value"], color=colour[label], marker="o", markersize=2, linewidth=1.4)
        ends.append((steps[-1], curve["value"].item(-1), words.label_text(label, 14), colour[label]))
        if beside is not None:
            other = beside["value"].sel(train=label, query=query) / scale
            ax.plot(other["step"], other, "s", color=colour[label], markerfacecolor="white", markersize=3)
    for event in events:
        if event.query == query and event.train in kept:
            _mark(ax, event, colour[event.train], scale)
    ax.margins(y=0.08)
    ax.set_title(f"on {words.quoted(query)}")
    style.end_labels(ax, ends, height)


def _mark(ax: Axes, event: Event, colour: str, scale: float) -> None:
    """A diamond on zero for a flip, a triangle on the curve for a peak, and a bar over the interval of either."""
    if event.detail.get("at_edge") or event.kind == "onset":
        return
    flip = event.kind == "flip"
    y = 0.0 if flip else float(event.detail["value"]) / scale
    marker = "D" if flip else "v" if event.kind == "helpful peak" else "^"
    ax.plot([event.lower, event.upper], [y, y], color=colour, linewidth=1, alpha=0.7)
    ax.plot(event.step, y, marker, color=colour, markerfacecolor="white", markersize=4, zorder=4, label=event.kind)


@style.styled
def influence_heatmaps(influence: xr.Dataset, steps: Sequence[int]) -> Figure:
    """The whole matrix of influence at a few steps, on one scale that the pairs of different labels set.

    Cells within two standard errors of zero carry a dot. Of more than :data:`MAX_ROWS` rows those are drawn that reach
    furthest from zero.
    """
    influence = furthest_rows(influence)
    matrices = influence.transpose("step", ..., "train", "query").sel(step=list(steps))
    value, stderr = matrices["value"].values, matrices["stderr"].values
    relative = _WITHOUT_UNIT.get(influence.attrs.get("kind", ""))
    scale, unit = (1.0, "") if relative else style.unit(np.where(others(matrices), value, 0), "nats per unit weight")
    limit = float(np.abs(value[:, others(matrices)]).max()) / scale or 1.0
    trains, queries = (matrices[dim].values.tolist() for dim in ("train", "query"))
    side = style.WIDTH / max(len(steps), 2)
    figure = style.canvas(min(0.55 + side * np.clip(len(trains) / len(queries), 0.25, 2), 9))
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for ax, step, matrix, error in zip(axes, steps, value, stderr, strict=True):
        image = ax.imshow(
            matrix / scale, cmap=style.DIVERGING, vmin=-limit, vmax=limit, interpolation="none", aspect="auto"
        )
        rows, columns = np.nonzero(np.abs(matrix) < 2 * error)
        ax.plot(columns, rows, ".", color="#8a8a8a", markersize=2, label="noise")
        ax.set_title(f"step {words.step_number(step)}")
        ax.set_xlabel("query")
        _name_cells(ax, queries, trains)
    axes[0].set_ylabel("train group")
    bar = figure.colorbar(image, ax=list(axes), extend="both", fraction=0.03, pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(relative or unit)
    end: dict[str, Any] = {"transform": bar.ax.transAxes, "ha": "center", "fontsize": 8}
    bar.ax.text(0.5, 1.05, "harmful", va="bottom", color=style.HARMFUL, **end)
    bar.ax.text(0.5, -0.05, "helpful", va="top", color=style.HELPFUL, **end)
    return figure


def furthest_rows(influence: xr.Dataset) -> xr.Dataset:
    """As many train groups, or samples, as a figure can hold: those that reach furthest from zero, in their order."""
    if influence.sizes["train"] <= MAX_ROWS:
        return influence
    reach = _reach(influence).max("query").values
    return influence.isel(train=np.sort(np.argsort(-reach, kind="stable")[:MAX_ROWS]))


def eventful_steps(influence: xr.Dataset, events: Sequence[Event], most: int = MAX_MATRICES) -> list[int]:
    """The checkpoints nearest to most flips and peaks, ascending; evenly spaced ones where events are too few."""
    steps = influence["step"].values
    happened = [e for e in events if e.kind != "onset" and not e.detail.get("at_edge")]
    nearest = [int(np.abs(np.log1p(steps) - np.log1p(event.step)).argmin()) for event in happened]
    frequency = np.bincount(nearest, minlength=len(steps))
    chosen = np.argsort(-frequency, kind="stable")[: min(most, np.count_nonzero(frequency))].tolist()
    if len(chosen) < min(most, len(steps)):
        chosen = evenly(len(steps), most)
    return [int(steps[k]) for k in sorted(chosen)]


def evenly(length: int, most: int) -> list[int]:
    """At most so many positions of a sequence, evenly spaced, both ends among them."""
    positions = np.linspace(0, length - 1, min(most, length)).round().astype(int)
    return [int(k) for k in positions]


def _name_cells(ax: Axes, columns: list[Any], rows: list[Any]) -> None:
    for axis, labels in ((ax.xaxis, columns), (ax.yaxis, rows)):
        named = len(labels) <= _MAX_TICK_LABELS
        texts = [words.label_text(label, 12) for label in labels] if named else []
        axis.set_ticks(np.arange(len(texts)), texts)
    if max((len(str(label)) for label in columns), default=0) * len(columns) > 30:
        ax.tick_params(axis="x", labelrotation=90)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
