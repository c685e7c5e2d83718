"""The look that all figures share: colours, the training-step axis, shading of untrusted checkpoints, labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from itertools import groupby
from typing import Any, ParamSpec, cast

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from stagewise.reporting import words

WIDTH = 9.6
"""Inches; a page shows 100 pixels per inch."""

STEPS = "training step (log scale)"

INK, MUTED, FAINT, SHADE = "#222222", "#6f6f6f", "#d9d9d9", "#f1efe9"
HELPFUL, HARMFUL = "#2b6ca3", "#b5452c"
"""Below and above zero, in every figure."""

DIVERGING = LinearSegmentedColormap.from_list(
    "influence", ["#1d4f80", HELPFUL, "#9dc1de", "#fbfaf7", "#eab59f", HARMFUL, "#84290f"]
)

# Ten colours that colour-blind readers can tell apart too: the least CIE76 distance, as seen with
# deuteranopia or protanopia, is 15 (tried by search).
_PALETTE = (
    "#2a35b0", "#cc4788", "#2d5353", "#cc9074", "#46a2d0", "#661919", "#2eb245", "#666619", "#6677d8", "#591966",
)  # fmt: skip

_FONTS = ("Helvetica Neue", "Arial", "Liberation Sans")
_MAX_TICKS = 7
_LOG_OF_ONE_MORE = (np.log1p, np.expm1)
_ALIKE = 0.01  # relative: of learning rates that count as one
_P = ParamSpec("_P")


def _style() -> dict[str, Any]:
    here = set(font_manager.get_font_names())
    return {
        "font.family": [*(name for name in _FONTS if name in here), "sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8.5,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": "#9a9a9a",
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": "#9a9a9a",
        "ytick.color": "#9a9a9a",
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "text.color": INK,
        "lines.linewidth": 1.5,
        "lines.solid_capstyle": "round",
        # Labels come from the data: a dollar sign is a dollar sign.
        "text.parse_math": False,
        # Text stays text: it can be searched and takes the fonts of the page.
        "svg.fonttype": "none",
        "svg.hashsalt": "stagewise",
        "pdf.fonttype": 42,
        "savefig.facecolor": "white",
    }


# Any: matplotlib names every setting in its types.
STYLE: Any = _style()


def styled(plot: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Make a figure in the shared style, and lay it out once so that saving it three times is cheap."""

    def make(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = plot(*args, **kwargs)
            if layout := figure.get_layout_engine():
                layout.execute(figure)
                figure.set_layout_engine("none")
        return figure

    make.__name__, make.__doc__ = plot.__name__, plot.__doc__
    return make


class Drawing(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_svg_(self) -> str:
        file, drawn = StringIO(), cast(Any, FigureCanvasSVG(self))
        with matplotlib.rc_context(STYLE):
            drawn.print_svg(file, metadata={"Date": None, "Creator": None})
        return file.getvalue()


def canvas(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches."""
    figure = Drawing(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.02, hspace=0.03)  # type: ignore[union-attr, call-arg]
    return figure


def colours(labels: Sequence[Any]) -> dict[Any, str]:
    """A colour for every label, by its position, so that a label has the same one in all figures."""
    return {label: _PALETTE[k % len(_PALETTE)] for k, label in enumerate(labels)}


def step_axis(ax: Axes, steps: Sequence[float] | NDArray[Any]) -> None:
    """A logarithmic axis of training steps that has a place for step 0: log(1 + step)."""
    ax.set_xscale("function", functions=_LOG_OF_ONE_MORE)
    ax.set_xlim(_step_limits(steps))
    _step_labels(ax.xaxis, steps)


def rate_axis(ax: Axes, losses: xr.Dataset) -> None:
    """Above an axis of steps, what the learning rates of the updates before sum to; nothing where they do not change.

    Call after ``step_axis``, with the losses of a run.
    """
    if "rates" not in losses or losses.sizes["step"] < 3:
        return
    steps, rates = losses["step"].values, losses["rates"].values
    each = np.diff(rates) / np.diff(steps)
    if np.ptp(each) <= _ALIKE * each.max():
        return
    above = ax.twiny()
    above.set_xscale("function", functions=_LOG_OF_ONE_MORE)
    above.set_xlim(ax.get_xlim())
    above.set_xticks([tick for tick in step_ticks(*ax.get_xlim()) if steps[0] <= tick <= steps[-1]])
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FuncFormatter(lambda step, _: words.number(np.interp(step, steps, rates), 2)))
    above.tick_params(labelsize=6.5, length=2)
    since = f" since step {words.step_number(steps[0])}" if steps[0] else ""
    above.set_xlabel(f"sum of learning rates{since}", fontsize=6.5)
    above.spines[["left", "right", "bottom"]].set_visible(False)


def step_axes(ax: Axes, steps: Sequence[float] | NDArray[Any]) -> None:
    """Two such axes, alike."""
    step_axis(ax, steps)
    ax.set_yscale("function", functions=_LOG_OF_ONE_MORE)
    ax.set_ylim(_step_limits(steps))
    _step_labels(ax.yaxis, steps)


def _step_limits(steps: Sequence[float] | NDArray[Any]) -> tuple[float, float]:
    low, high = np.log1p(min(steps)), np.log1p(max(steps))
    margin = 0.03 * (high - low) or 0.5
    return float(np.expm1(low - margin)), float(np.expm1(high + margin))


def _step_labels(axis: Axis, steps: Sequence[float] | NDArray[Any]) -> None:
    axis.set_major_locator(FixedLocator(step_ticks(float(min(steps)), float(max(steps)))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda step, _: words.short_step(step)))


def step_ticks(low: float, high: float) -> list[float]:
    """At most seven round steps from ``low`` to ``high``, 0 among them if it is there."""
    for digits in ((1, 2, 5), (1, 3), (1,)):
        round_steps = [0.0] + [float(d * 10**k) for k in range(10) for d in digits]
        ticks = [step for step in round_steps if low <= step <= high]
        if len(ticks) <= _MAX_TICKS:
            return ticks if len(ticks) > 1 else sorted({low, high})
    every = -(-len(ticks) // _MAX_TICKS)
    return ticks[:1] + ticks[1::every] if ticks[0] == 0 else ticks[::every]


def shade_untrusted(ax: Axes, trusted: xr.DataArray | None) -> None:
    """Grey out the checkpoints that cannot be answered, half way to their neighbours. Call after ``step_axis``."""
    if trusted is None or not trusted.sizes["step"]:
        return
    at = np.log1p(trusted["step"].values.astype(float))
    left, right = ax.get_xlim()
    edges = np.expm1(np.concatenate([[np.log1p(left)], (at[1:] + at[:-1]) / 2, [np.log1p(right)]]))
    for known, run in groupby(range(len(at)), key=lambda k: bool(trusted.values[k])):
        places = list(run)
        if not known:
            ax.axvspan(edges[places[0]], edges[places[-1] + 1], color=SHADE, linewidth=0, zorder=0, label="untrusted")


def end_labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]], height: float, size: float = 8) -> None:
    """Name curves at their right ends, moved apart as little as needed. Call after everything is drawn.

    Args:
        ax: the panel.
        ends: x, y, text and colour of every curve.
        height: of the panel, in inches.
        size: of the text, in points.
    """
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    ax.autoscale_view()  # matplotlib does it later, but the places depend on it
    x = [x for x, _, _, _ in ends]
    curve = (ax.transScale + ax.transLimits).transform(np.column_stack([x, [y for _, y, _, _ in ends]]))
    # Least squares subject to a smallest distance is isotonic regression of what is left beyond that distance.
    stacked = 1.25 * size / 72 / height * np.arange(len(ends))
    free = isotonic_regression(curve[:, 1] - stacked).x
    places = np.clip(free, 0, max(0, 1 - stacked[-1])) + stacked
    for (left, end), place, (_, _, text, colour) in zip(curve, places, ends, strict=True):
        ax.plot(
            [left, 1.02], [end, place], color=colour, linewidth=0.5, alpha=0.5, transform=ax.transAxes, clip_on=False
        )
        ax.text(1.03, place, text, transform=ax.transAxes, color=colour, fontsize=size, va="center")


def unit(values: Any, name: str = "nats", plain: float = 0.01) -> tuple[float, str]:
    """What to divide values by so that their numbers are short, and the unit this makes: (0.001, "10⁻³ nats").

    If the largest reaches ``plain``, nothing is changed.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    exponent = words.power_of_ten(float(np.abs(values).max()), plain) if values.size else 0
    return 10.0**exponent, f"{words.superscript(exponent)} {name}" if exponent else name


def name_axes(figure: Figure, x: str, y: str = "") -> None:
    """One pair of axis labels for all panels."""
    figure.supxlabel(x, fontsize=8.5, color=MUTED)
    if y:
        figure.supylabel(y, fontsize=8.5, color=MUTED)


def empty_axes_off(axes: NDArray[Any], used: int) -> None:
    """Hide the panels of a grid that hold nothing."""
    for ax in axes.ravel()[used:]:
        ax.set_axis_off()
