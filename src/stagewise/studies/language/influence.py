"""Exact influence between classes of tokens along a run, with two controls."""

from __future__ import annotations

import numpy as np
import xarray as xr

from stagewise.labels import NONE
from stagewise.retraining.window_influence import window_influence
from stagewise.studies.chance import Labels, shuffled, shuffled_within
from stagewise.studies.language.lab import Lab

CHANCE, SAME_WORDS = "chance", "same words"
_LABELLINGS = ("classes", CHANCE, SAME_WORDS)
_BETWEEN = "/"


def exact(lab: Lab, seed: int, labelling: str = "classes") -> xr.Dataset:
    """Exact influence of every class of training tokens during windows of one run.

    Windows begin at every checkpoint from which there are batches to their end. Backwards, the number of train groups
    costs nothing: tokens are grouped by their labels in all labellings together, and every labelling is a sum.

    Args:
        lab: the runs.
        seed: which run.
        labelling: the ``"classes"``; by ``"chance"``, with as many tokens of a class at each place of a sequence; with
            the ``"same words"``, as often each, elsewhere.

    Returns:
        ``value`` ``(step, train, query)``, nats per unit weight of one token; negative is helpful. See
        :func:`stagewise.window_influence`.
    """
    joint = lab.kept("influence", seed, lambda: _exact(lab, seed))
    return summed(joint, _LABELLINGS.index(labelling))


def labellings(lab: Lab, seed: int) -> list[Labels]:
    """The classes of the training tokens and both controls."""
    classes, generator = lab.data.classes, np.random.default_rng(seed)
    words = lab.data.train[:, 1:].numpy()
    return [classes, shuffled(classes, generator), shuffled_within(classes, words, generator)]


def _exact(lab: Lab, seed: int) -> xr.Dataset:
    first, *others = labellings(lab, seed)
    joint = first
    for labels in others:
        joint = np.char.add(np.char.add(joint, _BETWEEN), labels)
    return window_influence(
        lab.task(seed),
        lab.run(seed),
        window=lab.settings.window,
        groups=joint,
        steps=lab.settings.exact_starts,
        mode="reverse",
        progress=lab.told("exact influence", seed),
    )


def summed(joint: xr.Dataset, place: int) -> xr.Dataset:
    """Influence of the groups of one labelling from that of joint groups, each named ``one/other/...``.

    Args:
        joint: ``value`` and ``stderr`` ``(step, train, query)`` with ``train_size``; errors are 0 (known batches) or
            NaN, and stay so.
        place: of the labelling.
    """
    names = [str(label).split(_BETWEEN)[place] for label in joint["train"].values]
    by = xr.DataArray(names, dims="train", name="train")
    sizes = joint["train_size"].drop_vars("train").groupby(by).sum()
    sums = (
        (joint[["value", "stderr"]] * joint["train_size"])
        .drop_vars(["train", "train_size"])
        .groupby(by)
        .sum(skipna=False)
    )
    means = (sums / sizes).assign_coords(train_size=sizes).transpose("step", "train", "query")
    return means.sel(train=means["train"] != NONE).assign_attrs(joint.attrs)
