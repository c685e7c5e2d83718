"""The figures that say whether to believe the others: against retraining, and against the chains themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.reporting import style, words
from stagewise.reporting.figures import grid
from stagewise.results import headline, others
from stagewise.traces import verdicts

MAX_SCATTERS = 6


@style.styled
def predicted_against_measured(
    predicted: xr.Dataset, measured: xr.Dataset, scores: xr.Dataset, steps: list[int]
) -> Figure:
    """Effect of the changed window on every query: retraining against prediction, with the identity line.

    Bars are one standard error. Pairs of a group with itself are left out where there are others.
    """
    rows, columns = grid(len(steps), 3)
    figure = style.canvas(3.05 * rows + 0.25, style.WIDTH * max(columns, 2) / 3)
    axes = figure.subplots(rows, columns, squeeze=False)
    measured = measured.sel({dim: predicted[dim] for dim in ("train", "query")})
    scale, unit = style.unit(np.where(others(predicted), measured["effect"].transpose(..., "train", "query"), 0))
    for ax, step in zip(axes.ravel(), steps, strict=False):
        _scatter(ax, predicted.sel(step=step), measured.sel(step=step), scale)
        at = scores.sel(step=step)
        r, slope = (at[headline(scores, name)].item() for name in ("correlation", "slope"))
        everything = f" (all pairs: r {words.score(at['correlation'].item())})"
        text = f"r {words.score(r)}, slope {words.score(slope)}"
        ax.set_title(f"step {words.step_number(step)}", pad=16)
        shown = text + (everything if headline(scores, "correlation") != "correlation" else "")
        ax.text(0, 1.025, shown, transform=ax.transAxes, fontsize=8, color=style.MUTED, va="bottom")
    style.empty_axes_off(axes, len(steps))
    style.name_axes(figure, f"predicted effect ({unit})", f"measured effect ({unit})")
    return figure


def _scatter(ax: Axes, predicted: xr.Dataset, measured: xr.Dataset, scale: float) -> None:
    pairs = others(predicted)
    x, y, x_error, y_error = (
        (data[name].transpose("train", "query").values[pairs] / scale if name in data else np.zeros(pairs.sum()))
        for name in ("effect", "effect_stderr")
        for data in (predicted, measured)
    )
    reach = 1.12 * max(np.abs(x).max() + x_error.max(), np.abs(y).max() + y_error.max()) or 1.0
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.plot([-reach, reach], [-reach, reach], color="#9a9a9a", linewidth=0.8, zorder=1, label="identity")
    ax.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0)
    ax.axvline(0, color=style.FAINT, linewidth=0.6, zorder=0)
    ax.errorbar(x, y, y_error, x_error, fmt="none", ecolor=style.HELPFUL, elinewidth=0.7, alpha=0.35)
    ax.plot(x, y, "o", color=style.HELPFUL, markersize=3, alpha=0.8, markeredgewidth=0)
    ax.locator_params(nbins=5)
    trains, queries = (predicted[dim].values.tolist() for dim in ("train", "query"))
    for k in {int(np.argmin(y)), int(np.argmax(y))}:
        i, j = np.argwhere(pairs)[k]
        name = f"{words.label_text(trains[i], 8)}→{words.label_text(queries[j], 8)}"
        side = -1 if x[k] > 0 else 1
        ax.annotate(
            name,
            (x[k], y[k]),
            (8 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7,
            color=style.MUTED,
        )


@style.styled
def agreement_over_training(
    scores: Mapping[str, xr.Dataset], trusted: xr.DataArray | None = None, against: str = "measured"
) -> Figure:
    """Correlation with what estimators are held ``against``, and its slope on them, per checkpoint.

    The band of the first estimator is the 95% bootstrap interval over groups.
    """
    height = 3.1
    figure = style.canvas(height)
    axes = figure.subplots(1, 2)
    steps = np.unique(np.concatenate([data["step"].values for data in scores.values()]))
    own, tint = next(iter(scores)), dict(zip(scores, _estimator_colours(len(scores)), strict=True))
    titles = {"correlation": "correlation", "slope": f"slope {against} / predicted"}
    for ax, name in zip(axes, titles, strict=True):
        style.step_axis(ax, steps if trusted is None else np.union1d(steps, trusted["step"].values))
        style.shade_untrusted(ax, trusted)
        ax.axhline(1, color="#9a9a9a", linewidth=0.8, zorder=1)
        ax.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0)
        ax.set_ylim(_score_limits(scores[own], name))
        ends = []
        for label, data in scores.items():
            x, y = data["step"].values, data[headline(data, name)].values
            ax.plot(x, y, color=tint[label], marker="o", markersize=2.5, linewidth=2 if label == own else 1.2)
            if not np.isfinite(y).any():
                continue  # a slope of scores without a unit: there is no curve to name
            inside = float(np.clip(np.nan_to_num(y[-1]), *ax.get_ylim()))
            ends.append((float(x[-1]), inside, words.label_text(label), tint[label]))
        band = [scores[own][headline(scores[own], name) + end].values for end in ("_lower", "_upper")]
        ax.fill_between(scores[own]["step"].values, *band, color=tint[own], alpha=0.15, linewidth=0, label="band")
        ax.set_title(titles[name])
        ax.set_xlabel(style.STEPS)
        ax.locator_params(axis="y", nbins=6)
        style.end_labels(ax, ends, height - 0.75)
    return figure


def _estimator_colours(count: int) -> list[str]:
    palette = (style.HELPFUL, "#b3752b", "#666666", "#44aa99", "#aa4499", "#999933")
    return [palette[k % len(palette)] for k in range(count)]


def _score_limits(scores: xr.Dataset, name: str) -> tuple[float, float]:
    """A range that shows the report's own estimator; others may leave the panel."""
    if name == "correlation":
        lowest = scores[headline(scores, name)].min().item()
        return (-1.05, 1.05) if lowest < -0.25 else (-0.3, 1.05)
    values = scores[headline(scores, name)].values
    values = values[np.isfinite(values)]
    return min(-0.2, *values, 0.0) - 0.05, max(2.0, *(1.15 * values), 0.0)


_PANELS = {
    "rhat": ("R-hat", verdicts.MAX_RHAT, "at most"),
    "ess_bulk": ("effective draws per chain", verdicts.MIN_ESS_PER_CHAIN, "at least"),
    "loss_rise": ("rise of the training loss over the draws (nats)", None, ""),
    "even_share": ("share of the spread beyond first order", verdicts.MAX_EVEN_SHARE, "at most"),
}


def panels_there(diagnostics: xr.Dataset) -> list[str]:
    """The diagnostics of which at least one checkpoint has a number."""
    return [name for name in _PANELS if name in diagnostics and np.isfinite(diagnostics[name]).any()]


@style.styled
def chain_diagnostics(diagnostics: xr.Dataset, trusted: xr.DataArray | None = None) -> Figure:
    """What the verdicts rest on: R-hat, effective draws, loss rise, share beyond first order, with thresholds.

    Raises:
        ValueError: no checkpoint has any of them.
    """
    names = panels_there(diagnostics)
    if not names:
        raise ValueError(f"diagnostics must hold numbers of {[*_PANELS]}, got {[*diagnostics.data_vars]}")
    rows, columns = grid(len(names), 2)
    figure = style.canvas(1.95 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, name in zip(axes.ravel(), names, strict=False):
        style.step_axis(ax, diagnostics["step"].values)
        style.shade_untrusted(ax, trusted)
        _diagnostic(ax, diagnostics, name)
    style.empty_axes_off(axes, len(names))
    style.name_axes(figure, style.STEPS)
    return figure


def _diagnostic(ax: Axes, diagnostics: xr.Dataset, name: str) -> None:
    title, threshold, side = _PANELS[name]
    steps, values = diagnostics["step"].values, diagnostics[name].values.astype(float)
    errors = diagnostics[f"{name}_stderr"].values if f"{name}_stderr" in diagnostics else None
    if name == "ess_bulk":
        values = values / np.maximum(diagnostics["chains_ok"].values, 1)
    ax.errorbar(steps, values, errors, color=style.INK, marker="o", markersize=3, linewidth=1.1, elinewidth=0.8)
    ax.locator_params(axis="y", nbins=5)
    if threshold is not None:
        ax.axhline(threshold, color=style.HARMFUL, linewidth=0.9, linestyle=(0, (4, 3)), label="threshold")
        beside = ax.get_yaxis_transform()
        ax.text(
            1.01, threshold, f"{side} {threshold:g}", transform=beside, color=style.HARMFUL, fontsize=7.5, va="center"
        )
    if name != "rhat":
        ax.set_ylim(bottom=min(0, np.nanmin(values)))
    ax.set_title(title)
