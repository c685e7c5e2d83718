"""The law of total covariance on a posterior that has two phases: influence flips, spikes, and where it peaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from scipy.special import logit

from stagewise.influence.bif import bif
from stagewise.influence.phases import phase_decomposition
from stagewise.influence.trusted import TracesInMemory
from stagewise.reporting import style
from stagewise.reporting.page import Plate, Section
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.theory.double_well import (
    FLIPS,
    HARMFUL,
    HELPFUL,
    LATE,
    LOSSES,
    PHASES,
    Pair,
    exact_along,
    formula_peak,
    integrated_peak,
    losses,
    plateau,
    potential,
    probability,
)
from stagewise.studies.hierarchy.theory.tree import Floats

LABELS: dict[str, Any] = {"train": list(LOSSES), "queries": {"samples": list(LOSSES)}}
"""Every sample by its name, as traces carry labels."""
_SAMPLES = 100  # in the training set; n_beta is the same, so that kappa = 1

_COLOURS = {"first": "#46a2d0", "second": "#2a35b0", "between": "#cc4788", "total": style.INK}
_NAMES = {"first": "within the first phase", "second": "within the second phase", "between": "between the phases"}


def two_phases(lab: Lab) -> Experiment:
    """The parts of the influence from draws and their phases, as a user would get them, against quadrature."""
    odds = np.linspace(-4, 4, lab.settings.phase_checkpoints)
    walks = [draws_at(at, lab.settings.chains, lab.settings.phase_draws, seed) for seed, at in enumerate(odds)]
    traces = TracesInMemory({step: traces_of(walk) for step, walk in enumerate(walks)}, LABELS)
    parts = phase_decomposition(traces, {step: np.where(w > 0, *PHASES[::-1]) for step, w in enumerate(walks)})
    errors = z_scores(parts, exact_along(odds))
    bound = family_bound(len(errors), lab.settings.chains)
    identity = float(abs(parts["within"].sum("phase") + parts["between"] - parts["total"]).max())
    formula = {pair: formula_peak(pair) for pair in (HELPFUL, HARMFUL, LATE)}
    fitted = {pair: fitted_peak(parts, pair) for pair in formula}
    integral = max(abs(integrated_peak(pair) - peak) for pair, peak in formula.items())
    sampled = max(abs(fitted[pair] - peak) for pair, peak in formula.items())
    wider = plateau(HELPFUL)
    checks = [
        Check.at_most("two phases: within + between - total, largest", identity, 1e-10, ".1e"),
        Check.at_most(f"two phases: draws vs quadrature, largest of {len(errors)} |z|", errors.max(), bound, ".2f"),
        Check.at_most("two phases: π at the peak, quadrature vs formula, largest difference", integral, 0.005),
        Check.at_most("two phases: π at the peak, draws vs formula, largest difference", sampled, 0.02),
        *(
            Check.reported(f"two phases: π at the peak of '{pair[0]}' on '{pair[1]}', {how}", peak[pair], ".3f")
            for pair in formula
            for how, peak in (("draws", fitted), ("formula", formula))
        ),
        Check.reported("two phases: width of the spike at half its height, correlation / covariance", wider, ".2f"),
    ]
    finding = (
        f"Where a posterior has two phases, influence spikes while it is divided: at π = {fitted[HELPFUL]:.2f} where "
        f"the phases' own influences agree, at {fitted[LATE]:.2f} where they do not (formula: {formula[HELPFUL]:.2f}, "
        f"{formula[LATE]:.2f}). As a correlation the spike is a plateau, {wider:.1f} times as wide."
    )
    caption = (
        "A posterior with two phases, on a double well that tips over. Top: influence of four pairs of samples, split "
        "into what happens within the phases and between them; lines: quadrature, dots: draws with 95% intervals, "
        "dotted: the peak by formula. Bottom: the double well; and the influence of two pairs as a covariance, which "
        "spikes, and as a correlation, which is flat because its variances rise with it."
    )
    figure = _draw(odds, parts, bif(traces, kind="correlation"), formula)
    claim = Claim(
        "Between two phases influence peaks where both have weight 1/2, and so does the correlation",
        f"At {fitted[HELPFUL]:.2f} where the influences within the phases agree, at {fitted[LATE]:.2f} where they do "
        f"not. The correlation has no spike: it is {wider:.1f} times as wide at half its height.",
    )
    return Experiment(Section("Two phases", [Plate("two-phases", caption, figure)]), [finding], checks, [claim])


def draws_at(odds: float, chains: int, draws: int, seed: int) -> Floats:
    """Independent draws of w, ``(chain, draw)``."""
    uniform = np.random.default_rng(seed).random((chains, draws))
    grid, p = potential(odds)[0], probability(odds)
    # The inverse of the distribution on a grid; half of the mass of a point lies to its left.
    return np.interp(uniform, np.cumsum(p) - p / 2, grid)


def traces_of(walk: Floats) -> xr.DataTree:
    """Draws of w ``(chain, draw)`` as the loss traces that sampling would leave."""
    chains = {"chain": np.arange(len(walk))}
    anchor = losses(np.array(-1.0))
    seen = {
        "loss": (("chain", "draw", "sample"), losses(walk)),
        "loss_anchor": ("sample", anchor),
        "share": ("sample", np.full(anchor.shape, 1 / _SAMPLES)),
    }
    side = xr.Dataset(seen, chains)
    status = xr.Dataset({"status": ("chain", np.full(len(walk), "ok"))}, chains)
    queries = side.assign_attrs(is_training_set=True)
    tree = xr.DataTree.from_dict({"train": side, "queries/samples": queries, "chains": status})
    tree.attrs = {"n_beta": float(_SAMPLES), "kappa": 1.0, "localised": True, "metric": "euclidean"}
    return tree


def z_scores(parts: xr.Dataset, truth: xr.Dataset) -> Floats:
    """Size of the sampled parts' errors in standard errors, over all checkpoints, phases and pairs: ``(number,)``."""
    weight, *matrices = (
        abs((parts[name] - truth[name]) / parts[f"{name}_stderr"]).values
        for name in ("weight", "within", "between", "total")
    )
    once = np.triu_indices(parts.sizes["train"])  # influence is symmetric here
    return np.concatenate([weight.ravel(), *(matrix[..., *once].ravel() for matrix in matrices)])


def family_bound(numbers: int, chains: int) -> float:
    """What the largest of many |z| exceeds by chance in one study of twenty, were they independent (Bonferroni)."""
    return round(float(stats.t.isf(0.025 / numbers, chains - 1)), 2)


def fitted_peak(parts: xr.Dataset, pair: Pair) -> float:
    """Weight of the second phase at the extremum of the total, from draws.

    It is the vertex of the parabola in the weight through the sampled totals.
    """
    at = parts.sel(train=pair[0], query=pair[1])
    bend, tilt, _ = np.polyfit(at["weight"][:, 1], at["total"], 2, w=1 / at["total_stderr"])
    return float(-tilt / (2 * bend))


@style.styled
def _draw(odds: Floats, parts: xr.Dataset, correlation: xr.Dataset, formula: dict[Pair, float]) -> Figure:
    figure = style.canvas(5.0)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.15, 1]).flat
    axes = upper.subplots(1, 4)
    titles = {FLIPS: "flips", HELPFUL: "spikes, helpful", HARMFUL: "spikes, harmful", LATE: "peaks later"}
    for ax, (pair, title) in zip(axes, titles.items(), strict=True):
        _split(ax, odds, parts.sel(train=pair[0], query=pair[1]), pair)
        ax.set_title(title)
        if pair in formula:
            ax.axvline(logit(formula[pair]), color=style.MUTED, linewidth=0.9, linestyle=":", zorder=1)
    axes[0].set_ylabel("influence, nats per unit weight")
    handles = axes[0].get_legend_handles_labels()
    upper.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    well, *spikes = lower.subplots(1, 3)
    _wells(well)
    for ax, pair in zip(spikes, (HELPFUL, HARMFUL), strict=True):
        _plateau(ax, odds, parts, correlation, pair)
    spikes[0].set_ylabel("influence, scaled")
    spikes[0].legend(frameon=False, loc="upper center")
    return figure


def _split(ax: Axes, odds: Floats, at: xr.Dataset, pair: Pair) -> None:
    """Parts of the influence of one pair: lines exact, dots sampled."""
    dense = np.linspace(odds[0], odds[-1], 101)
    truth = exact_along(dense).sel(train=pair[0], query=pair[1])
    for name, colour in _COLOURS.items():
        part, where = ("within", {"phase": name}) if name in PHASES else (name, {})
        ax.plot(dense, truth[part].sel(where), color=colour, linewidth=1.2)
        error = 1.96 * at[f"{part}_stderr"].sel(where)
        ax.errorbar(
            odds, at[part].sel(where), error, fmt=".", color=colour, markersize=4, label=_NAMES.get(name, "total")
        )
    _weight_axis(ax, odds)


def _wells(ax: Axes) -> None:
    """The potential early, half way and late."""
    for odds, colour, name in ((-4, "#46a2d0", "early"), (0, style.MUTED, "half-way"), (4, "#2a35b0", "late")):
        w, height = potential(odds)
        ax.plot(w, height - height[abs(w + 1).argmin()], color=colour, label=name)
    ax.legend(frameon=False, loc="lower center")
    ax.set(xlim=(-1.6, 1.6), ylim=(-9, 32), xlabel="parameter w", ylabel="n_beta × training loss", title="double well")


def _plateau(ax: Axes, odds: Floats, parts: xr.Dataset, correlation: xr.Dataset, pair: Pair) -> None:
    """The total as a covariance, divided by its largest, and as a correlation."""
    chosen = {"train": pair[0], "query": pair[1]}
    dense = np.linspace(odds[0], odds[-1], 101)
    truth, at, normal = exact_along(dense).sel(chosen), parts.sel(chosen), correlation.sel(chosen)
    largest = float(abs(truth["total"]).max())
    for line, dots, error, colour, name in (
        (truth["total"] / largest, at["total"] / largest, at["total_stderr"] / largest, style.INK, "covariance"),
        (truth["correlation"], normal["value"], normal["stderr"], "#cc7a29", "correlation"),
    ):
        ax.plot(dense, line, color=colour, linewidth=1.2)
        ax.errorbar(odds, dots, 1.96 * error, fmt=".", color=colour, markersize=4, label=name)
    ax.set_title(f"'{pair[0]}' on '{pair[1]}'")
    _weight_axis(ax, odds)


def _weight_axis(ax: Axes, odds: Floats) -> None:
    """The second phase's weight, even in its log-odds."""
    weights = np.array([0.02, 0.1, 0.5, 0.9, 0.98])
    ax.set_xticks(logit(weights), [f"{weight:g}" for weight in weights])
    ax.set_xlim(odds[0] - 0.2, odds[-1] + 0.2)
    ax.axhline(0, color="#9a9a9a", linewidth=0.7, zorder=1)
    ax.set_xlabel("weight π of the second phase")
