"""Influence between classes of tokens along a run: exact, with a control, and held against changed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.retraining.window_influence import window_influence
from stagewise.studies.induction.classes import Labels, shuffled
from stagewise.studies.induction.lab import Lab


@dataclass(frozen=True, eq=False)
class ClassInfluence:
    """What each class of training tokens does to the loss of each class of query tokens, beside what is measured.

    Attributes:
        exact: as :func:`class_influence` returns it.
        measured: ``effect`` ``(weight, step, train, query)``, nats, of training the window again with the tokens of a
            class at another weight; see :func:`stagewise.window_ablation`.
        agreement: ``correlation`` and ``slope`` of measured on predicted effects ``(weight, step)``; see
            :func:`stagewise.agreement`.
    """

    exact: xr.Dataset
    measured: xr.Dataset
    agreement: xr.Dataset


def class_influence(
    lab: Lab, seed: int = 0, steps: Sequence[int] | None = None, classes: Labels | None = None
) -> xr.Dataset:
    """Exact influence of every class during windows of one run.

    Args:
        lab: whose runs.
        seed: of the run.
        steps: where windows begin; default every checkpoint whose window ends before training does.
        classes: of the training tokens, where they are not their own.

    Returns:
        ``value`` ``(step, train, query)``, nats per unit weight of one token; negative is helpful. Times ``train_size``
        it is the influence of the whole class. See :func:`stagewise.window_influence`.
    """
    settings, run = lab.settings, lab.run(seed)
    usable = [step for step in run.steps if step + settings.window <= settings.last]
    return window_influence(
        lab.task(seed),
        run,
        window=settings.window,
        groups=lab.data.classes if classes is None else classes,
        steps=usable if steps is None else steps,
    )


def control(lab: Lab, seed: int = 0, steps: Sequence[int] | None = None) -> xr.Dataset:
    """The same of classes whose tokens were drawn by chance, as many at each place of a sequence.

    What it shows is what any tokens do; what the classes show beyond it comes from which tokens they hold.
    """
    return class_influence(lab, seed, steps, shuffled(lab.data.classes, np.random.default_rng(seed)))


def checked_class_influence(lab: Lab, seed: int = 0, steps: Sequence[int] | None = None) -> ClassInfluence:
    """Exact influence, and what really happens where a class has another weight during the same windows.

    Args:
        lab: whose runs, and whose settings say the weights.
        seed: of the run.
        steps: where windows begin; default the settings' ``window_starts``.
    """
    settings, task, run = lab.settings, lab.task(seed), lab.run(seed)
    chosen = list(settings.window_starts if steps is None else steps)
    exact = class_influence(lab, seed, chosen)
    measured = [
        window_ablation(task, run, window=settings.window, weight=weight, groups=lab.data.classes, steps=chosen)
        for weight in settings.weights
    ]
    scores = [
        agreement(predicted_effect(exact, weight).effect, effects.effect)
        for weight, effects in zip(settings.weights, measured, strict=True)
    ]
    weights = xr.DataArray(list(settings.weights), dims="weight", name="weight")
    effects = xr.concat(measured, weights, combine_attrs="drop_conflicts")
    return ClassInfluence(exact, effects, xr.concat(scores, weights))
