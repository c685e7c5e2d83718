"""The law of total covariance, on a posterior that has two phases: flips, spikes, and plateaus of the correlation.

One parameter w moves in a double well. Training raises the well at w = +1 above or below that at w = -1:

    n_beta L(w) = BARRIER (w^2 - 1)^2 - odds S(w),        S(w) = 1/2 (1 + tanh(w / WIDTH))

so that the second phase, w > 0, has the weight pi = 1 / (1 + e^-odds). What a sample's loss does near each well is
chosen by hand. Draws are exact (inverse of the distribution on a grid), and so is what they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from stagewise.influence.bif import bif
from stagewise.influence.phases import phase_decomposition
from stagewise.report import style
from stagewise.report.page import Plate, Section
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import Check, Experiment, Lab
from stagewise.studies.hierarchy.tree import Floats

BARRIER, WIDTH = 8.0, 0.2
GRID: Floats = np.linspace(-2, 2, 8001)
ODDS: Floats = np.linspace(-5, 5, 21)
"""Logarithm of the odds of the second phase at the checkpoints."""
SAMPLES = 100
"""In the training set, of which a few are looked at; n_beta is the same, so that kappa = 1."""
PHASES = ("first", "second")
COLOURS = {"first": "#46a2d0", "second": "#2a35b0", "between": "#cc4788", "total": style.INK}

LOSSES = {
    "steady": (2.0, 2.0, 0.0),
    "turned": (2.0, -2.0, 0.0),
    "learnt": (0.25, 0.25, -0.4),
    "also learnt": (-0.25, -0.25, -0.4),
    "forgotten": (0.25, 0.25, 0.4),
    "steeper": (0.5, 2.1, -0.4),
    "also steeper": (0.25, 2.2, -0.4),
}
"""Slope of a sample's loss in the first well and in the second, and how much higher the second well is for it."""

PAIRS = {
    "flips": ("steady", "turned"),
    "spikes helpful": ("learnt", "also learnt"),
    "spikes harmful": ("learnt", "forgotten"),
    "peaks late": ("steeper", "also steeper"),
}


@dataclass(frozen=True)
class Drawn:
    """Loss traces held in memory, in the form of a store of sampled ones."""

    trees: Mapping[int, xr.DataTree]

    @property
    def labels(self) -> dict[str, Any]:
        """Every sample is a group of its own."""
        return {"train": list(LOSSES), "queries": {"samples": list(LOSSES)}}

    @property
    def steps(self) -> list[int]:
        """Checkpoints, ascending."""
        return sorted(self.trees)

    def load(self, step: int) -> xr.DataTree:
        """The traces of one step."""
        return self.trees[step]


def two_phases(lab: Lab) -> Experiment:
    """Parts of the influence by sampling, against quadrature."""
    walks = [draw(odds, lab.size.chains, lab.size.draws, seed) for seed, odds in enumerate(ODDS)]
    traces = Drawn({step: as_traces(walk) for step, walk in enumerate(walks)})
    phases = {step: np.where(walk > 0, *reversed(PHASES)) for step, walk in enumerate(walks)}
    parts = phase_decomposition(traces, phases)
    correlation = bif(traces, kind="correlation")
    truth = xr.concat([exact(odds) for odds in ODDS], xr.Variable("step", parts["step"].values))

    deviations = z_scores(parts, truth)
    bound = stats.t.isf(0.025 / len(deviations), lab.size.chains - 1)
    identity = float(abs(parts["within"].sum("phase") + parts["between"] - parts["total"]).max())
    peaks = {name: (fitted_peak(parts, pair), predicted_peak(pair)) for name, pair in PAIRS.items() if name != "flips"}
    scanned = max(abs(scanned_peak(PAIRS[name]) - formula) for name, (_, formula) in peaks.items())
    plateaus = {name: plateau(*PAIRS[name]) for name in ("spikes helpful", "spikes harmful")}
    checks = [
        Check.at_most("two phases: within + between - total, largest", identity, 1e-10, ".1e"),
        Check.at_most(f"two phases: sampled parts vs quadrature, largest of {len(deviations)} |z|",
                      float(deviations.max()), float(round(bound, 2)), ".2f"),
        Check.at_most("two phases: peak of the total by quadrature vs formula, largest |difference| in π",
                      scanned, 0.005),
        Check.at_most("two phases: peak of the sampled total vs formula, largest |difference| in π",
                      max(abs(fit - formula) for fit, formula in peaks.values()), 0.02),
    ]  # fmt: skip
    checks += [
        Check(f"two phases: π where the pair that {name} peaks, sampled (formula)", f"{fit:.3f} ({formula:.3f})")
        for name, (fit, formula) in peaks.items()
    ]
    checks += [
        Check(f"two phases: pair that {name}: width of correlation / of covariance at half height", f"{ratio:.2f}")
        for name, ratio in plateaus.items()
    ]
    finding = (
        f"Where a posterior has two phases, influence between samples on which the phases disagree spikes at "
        f"π = {peaks['spikes helpful'][0]:.2f} of the second phase, and at {peaks['peaks late'][0]:.2f} where the "
        f"phases' own influences differ (formula: {peaks['spikes helpful'][1]:.2f} and "
        f"{peaks['peaks late'][1]:.2f}); correlations show a plateau {plateaus['spikes helpful']:.1f} times as wide."
    )
    caption = (
        "A posterior with two phases. Top: influence of four pairs of samples while the weight of the second phase "
        "rises from 0 to 1, split into what happens within the phases and between them; lines: quadrature, dots: "
        "draws, with 95% intervals; dashed: where the formula has the peak. Bottom left: the double well. Bottom right: "
        "covariances spike where correlations, which are scaled by variances that rise too, are flat."
    )
    figure = _draw(parts, truth, correlation)
    return Experiment(Section("Two phases", [Plate("two-phases", caption, figure)]), [finding], checks)


def losses(w: Floats) -> Floats:
    """Loss of every sample, nats: of the shape of ``w`` and ``(sample,)``."""
    first, second, rise = np.array(list(LOSSES.values())).T
    share, w = _second(w)[..., None], w[..., None]
    values: Floats = 2 + (1 - share) * first * (w + 1) + share * (rise + second * (w - 1))
    return values


def _second(w: Floats) -> Floats:
    """S(w), 0 in the first well and 1 in the second."""
    step: Floats = (1 + np.tanh(w / WIDTH)) / 2
    return step


def density(odds: float) -> Floats:
    """Probability of every point of the grid, ``(point,)``."""
    p = np.exp(odds * _second(GRID) - BARRIER * (GRID**2 - 1) ** 2)
    probability: Floats = p / p.sum()
    return probability


def draw(odds: float, chains: int, draws: int, seed: int) -> Floats:
    """Independent draws of w, ``(chain, draw)``."""
    uniform = np.random.default_rng(seed).random((chains, draws))
    # The mass of a grid point lies half to its left and half to its right.
    p = density(odds)
    return np.interp(uniform, np.cumsum(p) - p / 2, GRID)


def as_traces(walk: Floats) -> xr.DataTree:
    """Draws of w ``(chain, draw)`` as the loss traces that sampling leaves."""
    chain = np.arange(len(walk))
    seen = {"loss": (("chain", "draw", "sample"), losses(walk)), "loss_anchor": ("sample", losses(np.array(-1.0)))}
    side = xr.Dataset(seen, {"chain": chain})
    status = xr.Dataset({"status": ("chain", np.full(len(walk), "ok"))}, {"chain": chain})
    query = side.assign_attrs(is_training_set=True)
    tree = xr.DataTree.from_dict({"train": side, "queries/samples": query, "chains": status})
    tree.attrs = {"n_beta": float(SAMPLES), "kappa": 1.0, "localised": True, "metric": "euclidean"}
    return tree


def exact(odds: float) -> xr.Dataset:
    """The parts of the influence by quadrature, named as :func:`phase_decomposition` names them."""
    p, values, second = density(odds), losses(GRID), GRID > 0

    def covariance(p: Floats) -> Floats:
        centred = values - p @ values
        return np.asarray((centred.T * p) @ centred)

    shares = np.array([p[~second].sum(), p[second].sum()])
    inside = [p * ~second / shares[0], p * second / shares[1]]
    within = np.stack([-share * covariance(part) for share, part in zip(shares, inside, strict=True)])
    shift = inside[1] @ values - inside[0] @ values
    total, spread = -covariance(p), np.sqrt(np.diag(covariance(p)))
    variables = {
        "weight": ("phase", shares),
        "within": (("phase", "train", "query"), within),
        "between": (("train", "query"), -shares.prod() * np.outer(shift, shift)),
        "total": (("train", "query"), total),
        "correlation": (("train", "query"), total / np.outer(spread, spread)),
    }
    return xr.Dataset(variables, {"phase": list(PHASES), "train": list(LOSSES), "query": list(LOSSES)})
