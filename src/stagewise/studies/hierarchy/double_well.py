"""A posterior that has two phases and is known exactly: one parameter w in a double well.

The data raise or lower the second well by log-odds,

    n_beta L(w) = BARRIER (w^2 - 1)^2 - odds S(w),        S(w) = 1/2 (1 + tanh(w / WIDTH)),

so that the second phase, w > 0, has the weight pi = 1 / (1 + e^-odds) but for the rare draws on the barrier. What a
sample's loss does in each well is chosen by hand. Draws are exact, from the inverse of the distribution on a grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from stagewise.studies.hierarchy.tree import Floats

BARRIER, WIDTH = 24.0, 0.2
PHASES = ("first", "second")
_SAMPLES = 100  # in the training set; n_beta is the same, so that kappa = 1
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


LABELS: dict[str, Any] = {"train": list(LOSSES), "queries": {"samples": list(LOSSES)}}
"""Every sample by its name, as traces carry labels."""


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


def _probability(odds: float) -> Floats:
    """Of every point of the grid ``(point,)``."""
    p = np.exp(-potential(odds)[1])
    probability: Floats = p / p.sum()
    return probability


def draw(odds: float, chains: int, draws: int, seed: int) -> Floats:
    """Independent draws of w, ``(chain, draw)``."""
    uniform = np.random.default_rng(seed).random((chains, draws))
    p = _probability(odds)
    # Half of the mass of a grid point lies to its left.
    return np.interp(uniform, np.cumsum(p) - p / 2, _GRID)


def traces_of(walk: Floats) -> xr.DataTree:
    """Draws of w ``(chain, draw)`` as the loss traces that sampling would leave."""
    chains = {"chain": np.arange(len(walk))}
    seen = {"loss": (("chain", "draw", "sample"), losses(walk)), "loss_anchor": ("sample", losses(np.array(-1.0)))}
    side = xr.Dataset(seen, chains)
    status = xr.Dataset({"status": ("chain", np.full(len(walk), "ok"))}, chains)
    queries = side.assign_attrs(is_training_set=True)
    tree = xr.DataTree.from_dict({"train": side, "queries/samples": queries, "chains": status})
    tree.attrs = {"n_beta": float(_SAMPLES), "kappa": 1.0, "localised": True, "metric": "euclidean"}
    return tree


def exact(odds: float) -> xr.Dataset:
    """Influence and its parts by quadrature, named as ``phase_decomposition`` names them.

    Returns:
        ``weight`` (phase), ``within`` (phase, train, query), ``between`` and ``total`` (train, query) in nats per unit
        weight, and ``correlation`` (train, query), minus that of the losses. Negative is helpful.
    """
    p, values, second = _probability(odds), losses(_GRID), _GRID > 0

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
