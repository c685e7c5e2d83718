"""A network trained by Adam: only in Adam's metric does the size of influence keep its meaning over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.influence.bif import bif
from stagewise.influence.gradients import gradient_product
from stagewise.reporting import style
from stagewise.reporting.page import Plate, Section
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import measured_influence
from stagewise.sampling.posterior import LocalPosterior, Metric
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import N_BETA_PER_SAMPLE, Lab, correlation, slope
from stagewise.studies.hierarchy.network import Run, optimizer, record, task
from stagewise.studies.hierarchy.settings import Settings
from stagewise.studies.hierarchy.theory.tree import KINDS, Floats

ADAM_RATE, ADAM_LAST, ADAM_WINDOW = 4e-4, 1400, 10
"""Learning rate, steps of a run, and steps of a window."""

METRICS: tuple[Metric, Metric] = ("adam", "euclidean")
_NAMES = {"adam": "Adam's metric", "euclidean": "Euclidean metric", "sampled": "sampled, Adam's metric"}
_COLOURS = {"adam": "#2a35b0", "euclidean": "#cc7a29", "sampled": "#cc4788"}


class Agreement(NamedTuple):
    """How well predictions agree with measurements.

    Attributes:
        pooled: correlation over all pairs and checkpoints.
        within: correlation over the pairs of a checkpoint, median of the checkpoints.
        sign: share of equal signs.
        size: slope of measured on predicted.
    """

    pooled: float
    within: float
    sign: float
    size: float

    @classmethod
    def of(cls, predicted: Floats, measured: Floats) -> Agreement:
        """From ``(checkpoint, pair)``."""
        within = [correlation(p, m) for p, m in zip(predicted, measured, strict=True)]
        sign = float(np.mean(np.sign(predicted) == np.sign(measured)))
        return cls(correlation(predicted, measured), float(np.median(within)), sign, slope(predicted, measured))


def adam(lab: Lab) -> Experiment:
    """Gradient products in both metrics, and sampling in Adam's, against window ablations of an Adam run."""
    steps, starts = checkpoints(lab.settings), lab.settings.adam_starts
    runs = [adam_run(lab, steps, seed) for seed in range(starts)]
    measured = [measure(lab, run) for run in runs]
    predicted = {metric: [predict(lab, run, metric) for run in runs] for metric in METRICS}
    scores = {
        metric: [Agreement.of(different(lab, p), different(lab, m)) for p, m in zip(values, measured, strict=True)]
        for metric, values in predicted.items()
    }
    drawn = sampled_influence(lab)
    there = np.flatnonzero(np.isin(steps, drawn["step"]))
    sampled = Agreement.of(different(lab, lab.matrix(drawn)), different(lab, measured[0][there]))
    pooled = {metric: float(np.median([score.pooled for score in scores[metric]])) for metric in METRICS}
    title = "Adam run, 10-step window ablations, off-diagonal"
    drawn_how = f"sampled in Adam's metric, one start, {len(there)} of {len(sampled_steps(lab.settings))} steps"
    checks = [
        Check.at_least(f"{title}: r in Adam's metric, median of {starts} starts", pooled["adam"], 0.9, ".3f"),
        Check.at_most(
            f"{title}: r in the Euclidean metric, median of {starts} starts", pooled["euclidean"], 0.4, ".3f"
        ),
        *(check for metric in METRICS for check in spread(f"{title}, {metric}", scores[metric])),
        Check.reported(f"{title}: r {drawn_how}", sampled.pooled, ".3f"),
        Check.reported(f"{title}: slope measured / predicted, {drawn_how}", sampled.size, ".2f"),
    ]
    caption = (
        "A network trained by Adam. Top: influence predicted at a checkpoint, by gradient products or by sampling, "
        "against influence measured by leaving an item out of the next 10 updates; all pairs of different items at all "
        "checkpoints of one run. The lines are equality; Euclidean products are too small, and stretched by one factor "
        "that is fitted to the measurements. Bottom: three pairs over training, each curve divided by its largest "
        "magnitude, sampled ones with 95% intervals; checkpoints share their noise, so that errors look smooth."
    )
    figure = _draw(lab, measured[0], {metric: predicted[metric][0] for metric in METRICS}, drawn)
    return Experiment(
        Section("A network trained by Adam", [Plate("adam", caption, figure)]), [_finding(scores, sampled)], checks
    )


def _finding(scores: dict[Metric, list[Agreement]], sampled: Agreement) -> str:
    middle = {metric: Agreement(*np.median(scores[metric], axis=0)) for metric in METRICS}
    ours, plain, starts = middle["adam"], middle["euclidean"], len(scores["adam"])
    return (
        f"On a network trained by Adam, gradient products in Adam's metric predict window ablations over all pairs and "
        f"checkpoints with r = {ours.pooled:.2f} and {ours.sign:.0%} of the signs; Euclidean ones with r = "
        f"{plain.pooled:.2f} and {plain.sign:.0%} (medians of {starts} starts). Within a checkpoint they differ less, "
        f"{ours.within:.3f} and {plain.within:.2f}: part of what the Euclidean metric loses is how sizes change from "
        f"checkpoint to checkpoint. The size in nats needs curvature too: slope {ours.size:.2f} for products, "
        f"{sampled.size:.2f} for sampling (one start, r = {sampled.pooled:.2f})."
    )


def checkpoints(settings: Settings) -> list[int]:
    """The checkpoints, without step 0, where Adam has no metric."""
    return [int(step) for step in np.linspace(0, ADAM_LAST, settings.adam_checkpoints + 1)[1:].round()]


def sampled_steps(settings: Settings) -> list[int]:
    """Those that are sampled."""
    every = settings.adam_sampled_every
    return checkpoints(settings)[every - 1 :: every]


def adam_run(lab: Lab, kept: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Run:
    """Full-batch Adam from a random start."""
    network = task(lab.items, seed=seed, dtype=dtype)
    return record(network, optimizer(lab.items, "adam", ADAM_RATE), ADAM_LAST, kept)


def measure(lab: Lab, run: Run) -> Floats:
    """Influence by leaving items out of a window, ``(checkpoint, train, query)``."""
    effects = window_ablation(run.task, run.trajectory, window=ADAM_WINDOW, weight=0.0, order=run.order)
    return lab.matrix(measured_influence(effects))


def predict(lab: Lab, run: Run, metric: Metric) -> Floats:
    """Gradient products, ``(checkpoint, train, query)``."""
    return lab.matrix(gradient_product(run.task, run.trajectory, LocalPosterior(window=ADAM_WINDOW, metric=metric)))


def sampled_influence(lab: Lab) -> xr.Dataset:
    """The sampled influence of the first run, at checkpoints that can be trusted."""
    run = adam_run(lab, sampled_steps(lab.settings), 0, torch.float32)
    posterior = LocalPosterior(window=ADAM_WINDOW, n_beta=N_BETA_PER_SAMPLE * len(lab.items.targets))
    return bif(lab.sample(run, posterior, "adam", draws=lab.settings.adam_draws))


def different(lab: Lab, matrices: Floats) -> Floats:
    """The pairs of different items, ``(checkpoint, pair)``."""
    return matrices[:, lab.off_diagonal]


def spread(title: str, scores: list[Agreement]) -> list[Check]:
    """Median and range over starts of every kind of agreement."""
    names = ("pooled r", "median r within a checkpoint", "equal signs", "slope measured / predicted")
    columns = zip(names, zip(*scores, strict=True), strict=True)
    return [
        Check.reported(f"{title}: {name}, median [range]", np.median(c), ".3g", lower=min(c), upper=max(c))
        for name, c in columns
    ]


@style.styled
def _draw(lab: Lab, measured: Floats, products: dict[Metric, Floats], drawn: xr.Dataset) -> Figure:
    figure = style.canvas(5.6)
    steps = checkpoints(lab.settings)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.25, 1]).flat
    *left, right = upper.subplots(1, 3)
    for ax, (metric, values) in zip(left, products.items(), strict=True):
        _scatter(ax, lab, values, measured, metric)
    _scatter(right, lab, lab.matrix(drawn), measured[np.isin(steps, drawn["step"])], "sampled")
    left[0].set_ylabel("measured, 10⁻³ nats per unit weight")
    left[0].legend(frameon=False, loc="upper left", markerscale=3, handletextpad=0)
    for ax, level in zip(lower.subplots(1, 3), (3, 2, 1), strict=True):
        query = int(np.flatnonzero(lab.level[0] == level)[0])
        _curves(ax, steps, measured[:, 0, query], {metric: values[:, 0, query] for metric, values in products.items()})
        value, error = (lab.matrix(drawn, name)[:, 0, query] for name in ("value", "stderr"))
        doubt = 1.96 * error / abs(value).max()
        style_of = {"color": _COLOURS["sampled"], "label": _NAMES["sampled"]}
        ax.errorbar(drawn["step"], drawing.scaled(value), doubt, fmt=".", markersize=5, linewidth=0.8, **style_of)
        ax.set_title(f"{lab.items.names[0]} on {lab.items.names[query]} ({KINDS[level]})")
    lower.axes[0].set_ylabel("influence / largest")
    lower.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curves(ax: Axes, steps: Sequence[int], measured: Floats, products: dict[Metric, Floats]) -> None:
    """One pair over training, each curve of its own height."""
    ax.plot(steps, drawing.scaled(measured), color=style.FAINT, linewidth=5, label="measured")
    for metric, values in products.items():
        ax.plot(steps, drawing.scaled(values), color=_COLOURS[metric], linewidth=1.2, label=_NAMES[metric])
    drawing.time_axis(ax, steps)
    ax.set_xlabel("training step")


def _scatter(ax: Axes, lab: Lab, predicted: Floats, measured: Floats, name: str) -> None:
    """Predicted against measured influence, by the level on which pairs part."""
    p, m = different(lab, predicted), different(lab, measured)
    factor = slope(p, m) if name == "euclidean" else 1.0
    for level, kind in KINDS.items():
        x, y = (1e3 * values[:, lab.level == level].ravel() for values in (factor * predicted, measured))
        ax.plot(x, y, ".", color=drawing.LEVEL_COLOURS[level], markersize=2, label=kind)
    ax.axline((0, 0), slope=1, color=style.MUTED, linewidth=0.7)
    ax.set_title(f"{_NAMES[name]}: r = {correlation(p, m):.2f}")
    ax.set_xlabel("predicted" if factor == 1 else f"predicted, × {factor:.0f}")
