"""Influence between classes of tokens before, in and after the transition: exact, and held against changed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xarray as xr

from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.retraining.window_influence import window_influence
from stagewise.studies.induction.lab import Lab


@dataclass(frozen=True, eq=False)
class ClassInfluence:
    """What each class of training tokens does to the loss of each class of query tokens.

    Attributes:
        exact: influence during a window, by differentiating its replay: ``value`` ``(step, train, query)``, nats per
            unit weight of one token; see :func:`stagewise.window_influence`.
        measured: ``effect`` ``(weight, step, train, query)``, nats, of training the window again with the tokens of a
            class at another weight; see :func:`stagewise.window_ablation`.
        agreement: ``correlation`` and ``slope`` of measured on predicted effects ``(weight, step)``; see
            :func:`stagewise.agreement`.
    """

    exact: xr.Dataset
    measured: xr.Dataset
    agreement: xr.Dataset


def class_influence(lab: Lab, seed: int = 0, steps: Sequence[int] | None = None) -> ClassInfluence:
    """Exact influence of every class during windows of one run, and what changed weights really do there.

    Args:
        lab: whose runs.
        seed: of the run.
        steps: where windows begin; default the settings'.
    """
    settings, task, run = lab.settings, lab.task(seed), lab.run(seed)
    window, chosen, groups = settings.window, list(steps or settings.window_starts), lab.data.classes
    exact = window_influence(task, run, window=window, groups=groups, steps=chosen)
    measured = [
        window_ablation(task, run, window=window, weight=weight, groups=groups, steps=chosen)
        for weight in settings.weights
    ]
    scores = [agreement(predicted_effect(exact, m.attrs["weight"]).effect, m.effect) for m in measured]
    weights = xr.DataArray(list(settings.weights), dims="weight", name="weight")
    return ClassInfluence(
        exact, xr.concat(measured, weights, combine_attrs="drop_conflicts"), xr.concat(scores, weights)
    )
