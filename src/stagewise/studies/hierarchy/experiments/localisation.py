"""How tightly the posterior holds: the curvature floor that hides sign flips, and which settings agree with truth."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from stagewise.dynamics.events import events
from stagewise.influence.bif import NoTrustedCheckpointError, bif
from stagewise.influence.trusted import ReadOnce, TracesInMemory
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import INSTANT_GAMMA, LOOSE_GAMMA, Lab, correlation
from stagewise.studies.hierarchy.settings import RATE
from stagewise.studies.hierarchy.theory.kernels import curvature_floor, gradient_kernel
from stagewise.studies.hierarchy.theory.tree import KINDS, Floats
from stagewise.studies.hierarchy.turns import kind_curves
from stagewise.traces.columns import Part
from stagewise.traces.store import TraceStore

PARTS: tuple[Part, Part] = ("full", "odd")


class Sampled(NamedTuple):
    """Influence x gamma of one posterior, full and odd part: ``(step, train, query)``, in the unit of the kernel."""

    full: Floats
    odd: Floats


def localisation(lab: Lab) -> Experiment:
    """Sampled influence at large and at small gamma against the gradient kernel; a sweep of the settings."""
    off = lab.off_diagonal
    modes, strengths = lab.predicted_strengths(lab.aligned, lab.times)
    kernel = -gradient_kernel(modes, strengths)
    floor = -curvature_floor(modes, strengths, lab.items.targets.shape[1]) / (2 * LOOSE_GAMMA)
    loose_traces = ReadOnce.of(lab.loose_traces)
    tight = _sampled(lab, ReadOnce.of(lab.instant_traces), INSTANT_GAMMA)
    loose = _sampled(lab, loose_traces, LOOSE_GAMMA)

    def agreement(part: Floats) -> float:
        return correlation(part[:, off], kernel[:, off])

    sweep = _sweep(lab)
    turning = {part: _turning(lab, loose_traces, part) for part in PARTS}
    what = "sampled BIF vs gradient kernel, gamma ="
    checks = [
        Check.at_least(f"{what} {INSTANT_GAMMA:g}: r", agreement(tight.full), 0.985),
        Check.reported(f"{what} {LOOSE_GAMMA:g}: r", agreement(loose.full), ".3f"),
        Check.at_least(f"{what} {LOOSE_GAMMA:g}, odd part: r", agreement(loose.odd), 0.85),
        Check.reported(f"the even part at gamma = {LOOSE_GAMMA:g} vs the curvature floor: r",
                       correlation((loose.full - loose.odd)[:, off], floor[:, off]), ".3f"),
        _sweep_check(sweep),
    ]  # fmt: skip
    section = Section(
        "How tightly the posterior holds",
        [
            Plate("curvature-floor", _floor_caption(), _draw_floor(lab, kernel, floor, tight, loose)),
            Plate("sweep", _sweep_caption(lab), _draw_sweep(sweep)),
        ],
    )
    hidden = _hidden(turning, agreement(loose.full), agreement(loose.odd))
    return Experiment(section, [hidden, _large_enough(sweep)], checks)


def _hidden(turning: dict[Part, set[str]], full: float, odd: float) -> str:
    return (
        f"Far from the checkpoint the losses bend, and that always looks helpful: at gamma = {LOOSE_GAMMA:g} the mean "
        f"pair turns harmful beyond noise in {len(turning['full'])} of {len(KINDS)} kinds (r with the gradient kernel "
        f"{full:.2f}). Draws reflected about the checkpoint remove it: by their odd part in {len(turning['odd'])} of "
        f"{len(KINDS)}, r = {odd:.2f}."
    )


def _sweep_check(sweep: xr.DataArray) -> Check:
    tight = sweep.isel(gamma=-1)
    what = f"sweep of settings of SGLD vs gradient kernel, gamma = {tight['gamma'].item():g}: least and largest r"
    return Check.reported(what, [tight.min(), tight.max()], ".2f")


def _large_enough(sweep: xr.DataArray) -> str:
    tight, kappas = sweep.isel(gamma=-1), sweep["kappa"].values
    least, most = (words.score(float(r)) for r in (tight.min(), tight.max()))
    change = float((tight.max("kappa") - tight.min("kappa")).max())
    return (
        f"How large a gamma is large enough: by SGLD at gamma = {tight['gamma'].item():g}, r with the kernel is "
        f"between {least}, where steps are too short to forget, and {most}; n_beta {kappas[-1] / kappas[0]:g} times as "
        f"large changes it by at most {change:.2f}."
    )


def _sampled(lab: Lab, traces: TraceStore, gamma: float) -> Sampled:
    # Draws far from first order are what is studied here, so that the verdicts on them are no reason to leave them out.
    return Sampled(*(gamma * lab.matrix(bif(traces, part=part, trusted_only=False)) for part in PARTS))


def _turning(lab: Lab, traces: TraceStore, part: Part) -> set[str]:
    """The kinds of pairs whose mean influence turns from helpful to harmful beyond noise."""
    found = events(kind_curves(lab, bif(traces, part=part, trusted_only=False)))
    return {event.train for event in found if event.kind == "flip" and event.detail["sign"] > 0}


def _sweep(lab: Lab) -> xr.DataArray:
    """R with the gradient kernel of SGLD at every setting, pooled over a few checkpoints."""
    size = lab.settings
    steps = [step for step, t in zip(lab.steps, lab.times, strict=True) if 1 <= t <= 4]
    steps = [steps[k] for k in np.linspace(0, len(steps) - 1, size.sweep_checkpoints).round().astype(int)]
    modes, strengths = lab.predicted_strengths(lab.aligned, RATE * np.array(steps))
    kernel = -gradient_kernel(modes, strengths)
    grid = {"gamma": size.sweep_gammas, "step_size": size.sweep_step_sizes, "kappa": size.sweep_kappas}
    combinations = list(product(*grid.values()))
    run, scores = lab.aligned_float32, []
    labels = {"train": run.task.train_groups, "queries": run.task.query_groups}
    for done, (gamma, step_size, kappa) in enumerate(combinations, start=1):
        posterior = LocalPosterior(gamma=gamma, n_beta=kappa * len(lab.items.targets), require_localised=False)
        sampling = Chains(
            "sgld", size.chains, draws=size.draws // 6, step_size=step_size / gamma, burn_in=60, thinning=3,
            reflect=False, batching="stacked",
        )  # fmt: skip
        trees = {step: sample_block(run.task, run.trajectory.load(step), posterior, sampling) for step in steps}
        scores.append(_score(lab, TracesInMemory(trees, labels), kernel))
        lab.progress("sweep of settings", done, len(combinations))
    shape = [len(values) for values in grid.values()]
    return xr.DataArray(np.reshape(scores, shape), {name: list(values) for name, values in grid.items()}, tuple(grid))


def _score(lab: Lab, traces: TracesInMemory, kernel: Floats) -> float:
    """Correlation with the kernel; NaN if at one of the checkpoints every chain left the posterior."""
    try:
        sampled = bif(traces, trusted_only=False)
    except NoTrustedCheckpointError:
        return float("nan")
    if sampled.sizes["step"] < len(kernel):
        return float("nan")
    off = lab.off_diagonal
    return correlation(lab.matrix(sampled)[:, off], kernel[:, off])


def _floor_caption() -> str:
    return (
        "Influence (times gamma) of a mean pair of each kind at large and at small gamma. Dashed: "
        "the gradient kernel. At gamma = 1000 all agree. At gamma = 20 the full covariance (thin) sinks towards the "
        "curvature floor (dotted), which is helpful for every pair and does not vanish when the gradients do; its odd "
        "part under reflection (thick) has no floor."
    )


def _sweep_caption(lab: Lab) -> str:
    size = lab.settings
    return (
        f"Correlation of sampled influence with the gradient kernel over off-diagonal pairs and "
        f"{size.sweep_checkpoints} checkpoints, by gamma (rows), step size of SGLD (columns) and n_beta (panels); "
        f"{size.chains} chains, 3 steps per draw. The kernel is the limit of large gamma: the question is how large is "
        "enough. Grey: chains left the posterior."
    )


@style.styled
def _draw_floor(lab: Lab, kernel: Floats, floor: Floats, tight: Sampled, loose: Sampled) -> Figure:
    figure = style.canvas(4.6)
    axes = figure.subplots(2, len(KINDS), sharex=True)
    for row, (gamma, sampled) in zip(axes, ((INSTANT_GAMMA, tight), (LOOSE_GAMMA, loose)), strict=True):
        for ax, level in zip(row, KINDS, strict=True):
            colour, kind = drawing.LEVEL_COLOURS[level], lab.of_kind(level)
            curve = partial(np.tensordot, b=kind, axes=2)
            drawing.time_axis(ax, lab.times)
            ax.plot(lab.times, curve(sampled.full), color=colour, linewidth=0.9)
            ax.plot(lab.times, curve(sampled.odd), color=colour, linewidth=2, alpha=0.7)
            ax.plot(lab.times, curve(kernel), "--", color=style.INK, linewidth=0.9)
            if gamma == LOOSE_GAMMA:
                ax.plot(lab.times, curve(floor), ":", color=style.MUTED)
            ax.set_title(f"{KINDS[level]} pairs, γ = {gamma:g}")
    style.name_axes(figure, drawing.TIME, "influence × γ (negative = helpful)")
    return figure


@style.styled
def _draw_sweep(sweep: xr.DataArray) -> Figure:
    figure = style.canvas(2.9)
    axes = figure.subplots(1, sweep.sizes["kappa"], sharey=True, squeeze=False)[0]
    for ax, kappa in zip(axes, sweep["kappa"].values, strict=True):
        panel = sweep.sel(kappa=kappa).transpose("gamma", "step_size").values
        image = ax.imshow(panel, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for (i, j), r in np.ndenumerate(panel):
            ax.text(j, i, words.score(r), ha="center", va="center", fontsize=8, color="white" if r < 0.7 else "black")
        ax.set_xticks(range(sweep.sizes["step_size"]), [f"{size:g}" for size in sweep["step_size"].values])
        ax.set_yticks(range(sweep.sizes["gamma"]), [f"{gamma:g}" for gamma in sweep["gamma"].values])
        ax.set_title(f"n_beta = {kappa:g} n")
        ax.spines[:].set_visible(False)
        ax.set_facecolor(style.FAINT)
    axes[0].set_ylabel("γ")
    style.name_axes(figure, "step size × γ")
    figure.colorbar(image, ax=list(axes), fraction=0.03, pad=0.01, label="r with the gradient kernel")
    return figure
