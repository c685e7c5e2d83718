"""The law of total covariance on a posterior that has two phases: influence flips, spikes, and where it peaks."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import logit

from stagewise.influence.bif import bif
from stagewise.influence.phases import phase_decomposition
from stagewise.influence.trusted import TracesInMemory
from stagewise.reporting import style
from stagewise.reporting.page import Plate, Section
from stagewise.studies.hierarchy.double_well import LABELS, PHASES, draw, exact, potential, traces_of
from stagewise.studies.hierarchy.lab import Check, Claim, Experiment, Lab
from stagewise.studies.hierarchy.tree import Floats

ODDS: Floats = np.linspace(-4, 4, 21)
"""Log-odds of the second phase at the checkpoints."""
DRAWS = 512
"""Of a chain: they cost little, and standard errors need hundreds of draws in the rarer phase."""

Pair = tuple[str, str]
FLIPS: Pair = ("steady", "turned")
HELPFUL: Pair = ("learnt", "also learnt")
HARMFUL: Pair = ("learnt", "forgotten")
LATE: Pair = ("steeper", "also steeper")

_COLOURS = {"first": "#46a2d0", "second": "#2a35b0", "between": "#cc4788", "total": style.INK}
_NAMES = {"first": "within the first phase", "second": "within the second phase", "between": "between the phases"}


def two_phases(lab: Lab) -> Experiment:
    """The parts of the influence from draws and their phases, as a user would get them, against quadrature."""
    walks = [draw(odds, lab.size.chains, DRAWS, seed) for seed, odds in enumerate(ODDS)]
    traces = TracesInMemory({step: traces_of(walk) for step, walk in enumerate(walks)}, LABELS)
    parts = phase_decomposition(traces, {step: np.where(w > 0, *PHASES[::-1]) for step, w in enumerate(walks)})
    errors = z_scores(parts, exact_along(ODDS))
    bound = family_bound(len(errors), lab.size.chains)
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
            Check(
                f"two phases: π at the peak of '{pair[0]}' on '{pair[1]}'", f"{fitted[pair]:.3f} (formula {peak:.3f})"
            )
            for pair, peak in formula.items()
        ),
        Check("two phases: width of the spike at half its height, correlation / covariance", f"{wider:.2f}"),
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
    figure = _draw(parts, bif(traces, kind="correlation"), formula)
    claim = Claim(
        "Between two phases influence peaks where both have weight 1/2, and so does the correlation",
        f"At {fitted[HELPFUL]:.2f} where the influences within the phases agree, at {fitted[LATE]:.2f} where they do "
        f"not. The correlation has no spike: it is {wider:.1f} times as wide at half its height.",
    )
    return Experiment(Section("Two phases", [Plate("two-phases", caption, figure)]), [finding], checks, [claim])


def exact_along(odds: Floats) -> xr.Dataset:
    """The truth at many log-odds, along ``step``."""
    return xr.concat([exact(value) for value in odds], xr.Variable("step", np.arange(len(odds))))


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


def formula_peak(pair: Pair) -> float:
    """Weight of the second phase at the extremum of the total, 1/2 + (Cov_second - Cov_first) / (2 Delta_i Delta_j)."""
    at = exact(0.0).sel(train=pair[0], query=pair[1])
    first, second = (-at["within"] / at["weight"]).values
    shifts = -at["between"] / at["weight"].prod()
    return float(0.5 + (second - first) / (2 * shifts))


def integrated_peak(pair: Pair) -> float:
    """The same by a search through the quadrature."""

    def chosen(odds: float) -> xr.Dataset:
        return exact(odds).sel(train=pair[0], query=pair[1])

    sign, bounds = np.sign(chosen(0.0)["between"].item()), (float(ODDS[0]), float(ODDS[-1]))
    found = minimize_scalar(lambda odds: -sign * chosen(odds)["total"].item(), bounds=bounds, method="bounded")
    return float(chosen(found.x)["weight"][1])


def fitted_peak(parts: xr.Dataset, pair: Pair) -> float:
    """The same from draws: vertex of the parabola in the weight through the sampled totals."""
    at = parts.sel(train=pair[0], query=pair[1])
    bend, tilt, _ = np.polyfit(at["weight"][:, 1], at["total"], 2, w=1 / at["total_stderr"])
    return float(-tilt / (2 * bend))


def plateau(pair: Pair) -> float:
    """How much wider the spike is as a correlation than as a covariance, at half its height in log-odds, exactly."""
    at = exact_along(np.linspace(-8, 8, 321)).sel(train=pair[0], query=pair[1])
    sign = np.sign(at["between"][160].item())
    widths = [(sign * at[name] > (sign * at[name]).max() / 2).sum().item() for name in ("correlation", "total")]
    return float(widths[0] / widths[1])


@style.styled
def _draw(parts: xr.Dataset, correlation: xr.Dataset, formula: dict[Pair, float]) -> Figure:
    figure = style.canvas(5.0)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.15, 1]).flat
    axes = upper.subplots(1, 4)
    titles = {FLIPS: "flips", HELPFUL: "spikes, helpful", HARMFUL: "spikes, harmful", LATE: "peaks later"}
    for ax, (pair, title) in zip(axes, titles.items(), strict=True):
        _split(ax, parts.sel(train=pair[0], query=pair[1]), pair)
        ax.set_title(title)
        if pair in formula:
            ax.axvline(logit(formula[pair]), color=style.MUTED, linewidth=0.9, linestyle=":", zorder=1)
    axes[0].set_ylabel("influence, nats per unit weight")
    handles = axes[0].get_legend_handles_labels()
    upper.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    well, *spikes = lower.subplots(1, 3)
    _wells(well)
    for ax, pair in zip(spikes, (HELPFUL, HARMFUL), strict=True):
        _plateau(ax, parts, correlation, pair)
    spikes[0].set_ylabel("influence, scaled")
    spikes[0].legend(frameon=False, loc="upper center")
    return figure


def _split(ax: Axes, at: xr.Dataset, pair: Pair) -> None:
    """Parts of the influence of one pair: lines exact, dots sampled."""
    dense = np.linspace(ODDS[0], ODDS[-1], 101)
    truth = exact_along(dense).sel(train=pair[0], query=pair[1])
    for name, colour in _COLOURS.items():
        part, where = ("within", {"phase": name}) if name in PHASES else (name, {})
        ax.plot(dense, truth[part].sel(where), color=colour, linewidth=1.2)
        error = 1.96 * at[f"{part}_stderr"].sel(where)
        ax.errorbar(
            ODDS, at[part].sel(where), error, fmt=".", color=colour, markersize=4, label=_NAMES.get(name, "total")
        )
    _weight_axis(ax)


def _wells(ax: Axes) -> None:
    """The potential early, half way and late."""
    for odds, colour, name in ((-4, "#46a2d0", "early"), (0, style.MUTED, "half-way"), (4, "#2a35b0", "late")):
        w, height = potential(odds)
        ax.plot(w, height - height[abs(w + 1).argmin()], color=colour, label=name)
    ax.legend(frameon=False, loc="lower center")
    ax.set(xlim=(-1.6, 1.6), ylim=(-9, 32), xlabel="parameter w", ylabel="n_beta × training loss", title="double well")


def _plateau(ax: Axes, parts: xr.Dataset, correlation: xr.Dataset, pair: Pair) -> None:
    """The total as a covariance, divided by its largest, and as a correlation."""
    chosen = {"train": pair[0], "query": pair[1]}
    dense = np.linspace(ODDS[0], ODDS[-1], 101)
    truth, at, normal = exact_along(dense).sel(chosen), parts.sel(chosen), correlation.sel(chosen)
    largest = float(abs(truth["total"]).max())
    for line, dots, error, colour, name in (
        (truth["total"] / largest, at["total"] / largest, at["total_stderr"] / largest, style.INK, "covariance"),
        (truth["correlation"], normal["value"], normal["stderr"], "#cc7a29", "correlation"),
    ):
        ax.plot(dense, line, color=colour, linewidth=1.2)
        ax.errorbar(ODDS, dots, 1.96 * error, fmt=".", color=colour, markersize=4, label=name)
    ax.set_title(f"'{pair[0]}' on '{pair[1]}'")
    _weight_axis(ax)


def _weight_axis(ax: Axes) -> None:
    """The second phase's weight, even in its log-odds."""
    weights = np.array([0.02, 0.1, 0.5, 0.9, 0.98])
    ax.set_xticks(logit(weights), [f"{weight:g}" for weight in weights])
    ax.set_xlim(ODDS[0] - 0.2, ODDS[-1] + 0.2)
    ax.axhline(0, color="#9a9a9a", linewidth=0.7, zorder=1)
    ax.set_xlabel("weight π of the second phase")
