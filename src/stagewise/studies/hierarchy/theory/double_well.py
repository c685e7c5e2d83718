"""A posterior that has two phases and is known exactly: one parameter w in a double well.

The data raise or lower the second well by log-odds,

    n_beta L(w) = BARRIER (w^2 - 1)^2 - odds S(w),        S(w) = 1/2 (1 + tanh(w / WIDTH)),

so that the second phase, w > 0, has the weight pi = 1 / (1 + e^-odds) but for the rare draws on the barrier. What a
sample's loss does in each well is chosen by hand.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.optimize import minimize_scalar

from stagewise.studies.hierarchy.theory.tree import Floats

BARRIER, WIDTH = 24.0, 0.2
PHASES = ("first", "second")
_GRID: Floats = np.linspace(-2, 2, 8001)

LOSSES = {
    "steady": (4.0, 4.0, 0.0),
    "turned": (4.0, -4.0, 0.0),
    "learnt": (0.5, 0.5, -0.4),
    "also learnt": (-0.5, -0.5, -0.4),
    "forgotten": (0.5, 0.5, 0.4),
    "steeper": (0.5, 4.0, -0.4),
    "also steeper": (0.5, 3.5, -0.4),
}
"""Samples: the slope of the loss in the first well, that in the second, and how much higher the loss is there."""

Pair = tuple[str, str]
"""Of a training sample and a query."""
FLIPS: Pair = ("steady", "turned")
HELPFUL: Pair = ("learnt", "also learnt")
HARMFUL: Pair = ("learnt", "forgotten")
LATE: Pair = ("steeper", "also steeper")
_FARTHEST = 4.0  # log-odds between which extrema are searched


def losses(w: Floats) -> Floats:
    """Loss of every sample in nats: the shape of ``w``, and ``(sample,)``."""
    first, second, rise = np.array(list(LOSSES.values())).T
    share, w = _second(w)[..., None], w[..., None]
    values: Floats = 2 + (1 - share) * first * (w + 1) + share * (rise + second * (w - 1))
    return values


def _second(w: Floats) -> Floats:
    """S(w): 0 in the first well, 1 in the second."""
    step: Floats = (1 + np.tanh(w / WIDTH)) / 2
    return step


def potential(odds: float) -> tuple[Floats, Floats]:
    """The grid, and n_beta L(w) on it: ``(point,)`` each."""
    return _GRID, BARRIER * (_GRID**2 - 1) ** 2 - odds * _second(_GRID)


def probability(odds: float) -> Floats:
    """Of every point of the grid of ``potential``: ``(point,)``."""
    p = np.exp(-potential(odds)[1])
    probability: Floats = p / p.sum()
    return probability


def exact(odds: float) -> xr.Dataset:
    """Influence and its parts by quadrature, named as ``phase_decomposition`` names them.

    Returns:
        ``weight`` (phase), ``within`` (phase, train, query), ``between`` and ``total`` (train, query) in nats per unit
        weight, and ``correlation`` (train, query), minus that of the losses. Negative is helpful.
    """
    p, values, second = probability(odds), losses(_GRID), _GRID > 0

    def covariance(p: Floats) -> Floats:
        centred = values - p @ values
        product: Floats = (centred.T * p) @ centred
        return product

    shares = np.array([p[~second].sum(), p[second].sum()])
    inside = [p * ~second / shares[0], p * second / shares[1]]
    shift = inside[1] @ values - inside[0] @ values
    whole = covariance(p)
    spread = np.sqrt(np.diag(whole))
    pairs = ("train", "query")
    variables = {
        "weight": ("phase", shares),
        "within": (("phase", *pairs), -shares[:, None, None] * np.stack([covariance(part) for part in inside])),
        "between": (pairs, -shares.prod() * np.outer(shift, shift)),
        "total": (pairs, -whole),
        "correlation": (pairs, -whole / np.outer(spread, spread)),
    }
    return xr.Dataset(variables, {"phase": list(PHASES), "train": list(LOSSES), "query": list(LOSSES)})


def exact_along(odds: Floats) -> xr.Dataset:
    """The truth at many log-odds, along ``step``."""
    return xr.concat([exact(value) for value in odds], xr.Variable("step", np.arange(len(odds))))


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

    sign, bounds = np.sign(chosen(0.0)["between"].item()), (-_FARTHEST, _FARTHEST)
    found = minimize_scalar(lambda odds: -sign * chosen(odds)["total"].item(), bounds=bounds, method="bounded")
    return float(chosen(found.x)["weight"][1])


def plateau(pair: Pair) -> float:
    """How much wider the spike is as a correlation than as a covariance, at half its height in log-odds, exactly."""
    at = exact_along(np.linspace(-8, 8, 321)).sel(train=pair[0], query=pair[1])
    sign = np.sign(at["between"][160].item())
    widths = [(sign * at[name] > (sign * at[name]).max() / 2).sum().item() for name in ("correlation", "total")]
    return float(widths[0] / widths[1])
