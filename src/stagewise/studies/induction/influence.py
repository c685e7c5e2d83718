"""Influence between classes of tokens along a run: exact, with a control, and by products of gradients."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stagewise.influence.gradients import gradient_product
from stagewise.retraining.window_influence import window_influence
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.chance import Labels, shuffled
from stagewise.studies.induction.lab import Lab


def exact(lab: Lab, seed: int) -> xr.Dataset:
    """Exact influence of every class of training tokens during windows of one run.

    Windows begin at every checkpoint from which there are batches to their end.

    Returns:
        ``value`` ``(step, train, query)``, nats per unit weight of one token; negative is helpful. See
        :func:`stagewise.window_influence`, and :func:`stagewise.studies.effects.of_classes` for that of a whole class.
    """
    return lab.kept("influence", seed, lambda: _exact(lab, seed, lab.data.classes, "exact influence"))


def control(lab: Lab, seed: int) -> xr.Dataset:
    """The same of classes whose tokens were drawn by chance, as many at each place of a sequence.

    What it shows is what any tokens do; what the classes show beyond it comes from which tokens they hold.
    """
    return lab.kept("control", seed, lambda: _exact(lab, seed, chance_classes(lab, seed), "of chance labels"))


def chance_classes(lab: Lab, seed: int) -> Labels:
    """The control's classes of the training tokens."""
    return shuffled(lab.data.classes, np.random.default_rng(seed))


def _exact(lab: Lab, seed: int, classes: Labels, what: str) -> xr.Dataset:
    settings, run = lab.settings, lab.run(seed)
    return window_influence(
        lab.task(seed),
        run,
        window=settings.window,
        groups=classes,
        steps=[step for step in run.steps if step + settings.window <= settings.last],
        progress=lab.told(what, seed),
    )


def gradients(lab: Lab, seed: int) -> xr.Dataset:
    """Products of gradients where the settings' windows begin, scaled for the length of a window.

    Returns:
        ``value`` ``(step, train, query)``, nats per unit weight of one token; see :func:`stagewise.gradient_product`.
    """

    def compute() -> xr.Dataset:
        posterior, starts = LocalPosterior(window=lab.settings.window), lab.settings.window_starts
        return gradient_product(lab.task(seed), lab.run(seed), posterior, steps=starts)

    return lab.kept("gradients", seed, compute)
