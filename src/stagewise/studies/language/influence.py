"""Exact influence between classes of tokens along a run, with two controls."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stagewise.retraining.window_influence import window_influence
from stagewise.studies.chance import Labels, shuffled, shuffled_within
from stagewise.studies.labellings import joint, summed
from stagewise.studies.language.lab import Lab

CHANCE, SAME_WORDS = "chance", "same words"
_LABELLINGS = ("classes", CHANCE, SAME_WORDS)


def exact(lab: Lab, seed: int, labelling: str = "classes") -> xr.Dataset:
    """Exact influence of every class of training tokens during windows of one run.

    Windows begin at every checkpoint from which there are batches to their end.

    Args:
        lab: the runs.
        seed: which run.
        labelling: the ``"classes"``; by ``"chance"``, with as many tokens of a class at each place of a sequence; with
            the ``"same words"``, as often each, elsewhere.

    Returns:
        ``value`` ``(step, train, query)``, nats per unit weight of one token; negative is helpful. See
        :func:`stagewise.window_influence`.
    """
    together = lab.kept("influence", seed, lambda: _exact(lab, seed))
    return summed(together, _LABELLINGS.index(labelling))


def labellings(lab: Lab, seed: int) -> list[Labels]:
    """The classes of the training tokens and both controls."""
    classes, generator = lab.data.classes, np.random.default_rng(seed)
    words = lab.data.train[:, 1:].numpy()
    return [classes, shuffled(classes, generator), shuffled_within(classes, words, generator)]


def _exact(lab: Lab, seed: int) -> xr.Dataset:
    return window_influence(
        lab.task(seed),
        lab.run(seed),
        window=lab.settings.window,
        groups=joint(labellings(lab, seed)),
        steps=lab.settings.exact_starts,
        mode="reverse",
        progress=lab.told("exact influence", seed),
    )
