"""Does influence at the end of training resemble influence at an earlier time? Rank correlations of what is exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.network import FIRST, SECOND, task
from stagewise.studies.hierarchy.theory.removal import leave_one_out
from stagewise.studies.hierarchy.theory.tree import Floats


def exact_influence(lab: Lab, seed: int, times: Floats) -> Floats:
    """Leave-one-out from a random start, in closed form: ``(time, left out, query)``."""
    weights = task(lab.items, seed=seed).state()
    return leave_one_out(lab.items.targets.T, weights[FIRST].numpy(), weights[SECOND].numpy(), times)


def resemblance(influence: Floats, items: NDArray[np.intp] | None = None) -> Floats:
    """Spearman's correlation of every time's matrix with the last, over pairs of different items: ``(time,)``.

    Args:
        influence: ``(time, left out, query)``.
        items: which items there are, some perhaps twice; default all.
    """
    items = np.arange(influence.shape[1]) if items is None else items
    pairs = influence[:, items[:, None], items][:, items[:, None] != items]
    ranks = rankdata(pairs, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    sizes = np.sqrt((ranks**2).sum(1))
    correlations: Floats = ranks @ ranks[-1] / (sizes * sizes[-1])
    return correlations


def over_items(influence: Floats, resamples: int, seed: int = 0) -> Floats:
    """95% interval of the resemblance by a bootstrap over items: ``(2, time)``."""
    count = influence.shape[1]
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    draws = [resemblance(influence, items) for items in drawn]
    interval: Floats = np.quantile(draws, [0.025, 0.975], axis=0)
    return interval


def over_starts(lab: Lab, times: Floats) -> Floats:
    """The resemblance from many random starts, ``(start, time)``."""
    return np.stack([resemblance(exact_influence(lab, seed, times)) for seed in range(lab.settings.starts)])
