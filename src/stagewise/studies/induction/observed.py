"""The local posterior of every checkpoint: one set of draws, from which all that is observed of it is computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stagewise.influence.trusted import ReadOnce
from stagewise.run.engine import sample
from stagewise.studies.chance import Labels
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.settings import OBSERVED_SEQUENCES, OBSERVING, POSTERIOR
from stagewise.studies.induction.training import task
from stagewise.task import Task

_THIRDS = np.array(["first", "middle", "last"])


def by_third(classes: Labels) -> Labels:
    """Class and third of the sequence of every predicted token ``(n, length - 1)``: ``"induction last"``."""
    length = classes.shape[1]
    return np.char.add(np.char.add(classes, " "), _THIRDS[np.arange(length) * 3 // length])


def observed_task(lab: Lab, seed: int) -> Task:
    """The task of a run with a few sequences for all, and its tokens by class and third of the sequence."""
    data, few = lab.data, slice(OBSERVED_SEQUENCES)
    labelled = replace(
        data,
        classes=by_third(data.classes),
        queries=data.queries[few],
        query_classes=by_third(data.query_classes[few]),
    )
    return task(labelled, lab.settings, seed, OBSERVED_SEQUENCES)


def traces(lab: Lab, seed: int) -> ReadOnce:
    """Losses over the draws of every observed checkpoint of a run, kept in the lab's folder."""
    store = sample(
        observed_task(lab, seed),
        lab.run(seed),
        POSTERIOR,
        out=lab.folder / f"observed-seed-{seed}",
        sampling=OBSERVING,
        steps=lab.settings.observed,
        progress=lab.told("chains", seed),
    )
    return ReadOnce.of(store)
