"""Exact influence between classes of tokens along a run, with a control."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from stagewise.retraining.window_influence import window_influence
from stagewise.studies.chance import Labels, shuffled
from stagewise.studies.induction.lab import Lab
from stagewise.studies.labellings import joint, summed


def exact(lab: Lab, seed: int) -> xr.Dataset:
    """Exact influence of every class of training tokens during windows of one run.

    Windows begin at every checkpoint from which there are batches to their end.

    Returns:
        ``value`` ``(step, train, query)``, nats per unit weight of one token; negative is helpful. See
        :func:`stagewise.window_influence`, and :func:`stagewise.studies.effects.of_classes` for that of a whole class.
    """
    return summed(_everywhere(lab, seed), 0)


def control(lab: Lab, seed: int) -> xr.Dataset:
    """The same of classes whose tokens were drawn by chance, as many at each place of a sequence.

    What it shows is what any tokens do; what the classes show beyond it comes from which tokens they hold.
    """
    return summed(_everywhere(lab, seed), 1)


def exact_at_starts(lab: Lab, seed: int) -> xr.Dataset:
    """That of the classes where the settings' windows begin, which can be had without the others."""
    return summed(_at_starts(lab, seed), 0)


def chance_classes(lab: Lab, seed: int) -> Labels:
    """The control's classes of the training tokens."""
    return shuffled(lab.data.classes, np.random.default_rng(seed))


def _everywhere(lab: Lab, seed: int) -> xr.Dataset:
    """Of both labellings together."""
    starts = [step for step in lab.settings.exact_starts if step not in lab.settings.window_starts]
    elsewhere = lab.kept("influence-elsewhere", seed, lambda: _exact(lab, seed, starts))
    return xr.concat([_at_starts(lab, seed), elsewhere], "step").sortby("step")


def _at_starts(lab: Lab, seed: int) -> xr.Dataset:
    return lab.kept("influence-at-starts", seed, lambda: _exact(lab, seed, lab.settings.window_starts))


def _exact(lab: Lab, seed: int, starts: Sequence[int]) -> xr.Dataset:
    return window_influence(
        lab.task(seed),
        lab.run(seed),
        window=lab.settings.window,
        groups=joint([lab.data.classes, chance_classes(lab, seed)]),
        steps=starts,
        mode="reverse",
        progress=lab.told("exact influence", seed),
    )
