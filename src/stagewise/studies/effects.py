"""Influence of whole classes of tokens, and what happens where windows are trained again with other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from stagewise.groups import same_label
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.studies.runs import Runs

Estimator = Callable[[Any, int], xr.Dataset]
"""A lab and a seed to influence ``value`` ``(step, train, query)``, of all windows or of those that it can answer."""

SCORES = ("correlation", "slope")
"""How predicted and measured effects agree, see :func:`stagewise.agreement`."""


def of_classes(influence: xr.Dataset) -> xr.DataArray:
    """Influence of whole classes ``(step, train, query)``, nats per unit weight of all tokens of a class."""
    return (influence["value"] * influence["train_size"]).transpose("step", "train", "query")


def trained_again(lab: Runs[Any], seed: int) -> xr.Dataset:
    """What happens where a class has another weight during the settings' windows.

    Returns:
        ``effect`` ``(weight, step, train, query)``, nats; see :func:`stagewise.window_ablation`.
    """
    return lab.kept("trained-again", seed, lambda: _trained_again(lab, seed))


def _trained_again(lab: Runs[Any], seed: int) -> xr.Dataset:
    settings = lab.settings
    effects = [
        window_ablation(
            lab.task(seed),
            lab.run(seed),
            window=settings.window,
            weight=weight,
            steps=settings.window_starts,
            progress=lab.told(f"training again at weight {weight:g}", seed),
        )
        for weight in settings.weights
    ]
    weights = xr.DataArray(list(settings.weights), dims="weight", name="weight")
    return xr.concat(effects, weights, combine_attrs="drop_conflicts")


class Effects(NamedTuple):
    """Effects ``(seed, step, train, query)``, nats, and how they agree ``(seed, step)``; NaN where there is no answer.

    Attributes:
        predicted: what an estimator says.
        measured: by training again.
        scores: ``correlation`` and ``slope``.
    """

    predicted: xr.DataArray
    measured: xr.DataArray
    scores: xr.Dataset


def effects(lab: Runs[Any], estimator: Estimator, weight: float, apart: bool) -> Effects:
    """What an estimator says of windows in which a class has another weight, and what happens there.

    Args:
        lab: the runs.
        estimator: which one.
        weight: of the class.
        apart: only pairs of different classes.
    """
    predicted, measured, agreed = [], [], []
    for seed in lab.seeds:
        happened = trained_again(lab, seed)["effect"].sel(weight=weight, drop=True)
        said = predicted_effect(estimator(lab, seed), weight)["effect"]
        measured.append(happened)
        agreed.append(_scores(said, happened, apart))
        predicted.append(said.reindex_like(happened).transpose(*happened.dims))
    said_of_all, happened_to_all = xr.concat(predicted, "seed"), xr.concat(measured, "seed")
    if apart:
        same = same_label(happened_to_all["train"].values, happened_to_all["query"].values)
        other = ~xr.DataArray(same, dims=("train", "query"))
        said_of_all, happened_to_all = said_of_all.where(other), happened_to_all.where(other)
    return Effects(said_of_all, happened_to_all, xr.concat(agreed, "seed"))


def _scores(predicted: xr.DataArray, measured: xr.DataArray, apart: bool) -> xr.Dataset:
    """Correlation and slope ``(step)`` at all steps of ``measured``."""
    shared = np.intersect1d(predicted["step"].values, measured["step"].values)
    if not len(shared):
        return xr.Dataset(dict.fromkeys(SCORES, measured["step"] * np.nan))
    return scores(predicted, measured.sel(step=shared), apart).reindex(step=measured["step"])


def scores(predicted: xr.DataArray, measured: xr.DataArray, apart: bool) -> xr.Dataset:
    """Correlation and slope ``(step)`` of measured on predicted effects.

    Args:
        predicted: ``(step, train, query)``, nats.
        measured: the same.
        apart: only pairs of different classes.
    """
    names = {f"{name}{'_off_diagonal' if apart else ''}": name for name in SCORES}
    return agreement(predicted, measured)[list(names)].rename(names)
