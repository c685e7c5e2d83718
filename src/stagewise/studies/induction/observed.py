"""The local posterior of every checkpoint: one set of draws, from which all that is observed of it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xarray as xr

from stagewise.dynamics.spectrum import top_eigenvalue_share
from stagewise.influence.bif import bif
from stagewise.influence.trusted import ReadOnce
from stagewise.run.engine import sample
from stagewise.studies.induction.classes import by_third
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.settings import OBSERVED_SEQUENCES, OBSERVING, POSTERIOR
from stagewise.studies.induction.training import EXCESS, LOSS, task
from stagewise.task import Task


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
        progress=lambda what, done, total: lab.progress(f"{what}, seed {seed}", done, total),
    )
    return ReadOnce.of(store)


def spectrum(store: ReadOnce) -> xr.Dataset:
    """Share of the top eigenvalue of the covariance between kinds of tokens: ``value`` and ``stderr`` ``(step)``.

    Kinds of a single token, or of none in one of the two data sets, are left out.
    """
    found, prefix = bif(store), f"{LOSS}:"
    several = found["train"].values[found["train_size"].values > 1].tolist()
    both = [name for name in several if prefix + name in found["query"].values]
    kinds = found.sel(train=both, query=[prefix + name for name in both]).assign_coords(query=both)
    return top_eigenvalue_share(kinds)[["share", "stderr"]].rename(share="value")


def influence(store: ReadOnce) -> xr.Dataset:
    """Of all induction tokens on the excess, ``value`` and ``stderr`` ``(step)``, nats per unit weight of them all."""
    classes = np.char.partition(store.labels["train"], " ")[..., 0]
    found = bif(store, train_groups=classes).sel(train="induction", query=EXCESS)
    return found.reset_coords(drop=True)[["value", "stderr", "replicates"]] * float(found["train_size"])


def excess(store: ReadOnce, steps: Sequence[int]) -> xr.Dataset:
    """Its standard deviation over the draws, ``spread``, and that of the checkpoint, ``anchor``, nats ``(step)``."""
    each = []
    for step in steps:
        seen = store.load(step)[f"queries/{EXCESS}"].to_dataset()
        mean = seen["loss"].mean([dim for dim in seen["loss"].dims if dim not in ("chain", "draw")])
        each.append(xr.Dataset({"spread": mean.std(ddof=1), "anchor": seen["loss_anchor"].mean()}))
    return xr.concat(each, xr.Variable("step", list(steps)))
