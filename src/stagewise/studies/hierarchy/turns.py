"""When the influence between the pairs of one kind turns, sampled and in truth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr

from stagewise.dynamics.events import Event, events
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.theory.tree import KINDS, Floats


class Turns(NamedTuple):
    """Two events of the mean influence between the pairs of one kind.

    Attributes:
        flip: from helpful to harmful, sampled.
        peak: the harmful peak, sampled.
        true_flip: time of the flip in truth.
        true_peak: time of the harmful peak in truth.
    """

    flip: Event
    peak: Event
    true_flip: float
    true_peak: float


def kind_curves(lab: Lab, influence: xr.Dataset) -> xr.Dataset:
    """Mean influence over the pairs of each kind, with its replicates; ``train`` is the kind."""
    chosen = influence.sel(train=lab.items.names, query=lab.items.names)
    value = kind_means(lab, chosen["value"].transpose("step", "train", "query").values)
    replicates = kind_means(lab, chosen["replicates"].transpose("step", "replicate", "train", "query").values)
    stderr = replicates.std(1, ddof=1) / replicates.shape[1] ** 0.5
    dims = ("step", "train", "query")
    variables = {
        "value": (dims, value[..., None]),
        "stderr": (dims, stderr[..., None]),
        "replicates": (("step", "replicate", "train", "query"), replicates[..., None]),
    }
    coords = {"step": chosen["step"].values, "train": list(KINDS.values()), "query": ["mean pair"]}
    return xr.Dataset(variables, coords, influence.attrs)


def kind_means(lab: Lab, matrices: Floats) -> Floats:
    """Means over the pairs of each kind: ``(..., train, query)`` to ``(..., kind)``."""
    return np.stack([np.tensordot(matrices, lab.of_kind(level), 2) for level in KINDS], -1)


def turns_of_kinds(curves: xr.Dataset, times: Floats, truth: Floats) -> list[Turns]:
    """Sampled events of every kind beside those of the true curves.

    Args:
        curves: from :func:`kind_curves`.
        times: of the truth ``(time,)``.
        truth: true mean influence ``(time, kind)``.

    Raises:
        ValueError: the sampled curve of a kind has no flip to harmful, or no harmful peak, beyond its noise.
    """
    found = events(curves)
    return [_turns([e for e in found if e.train == kind], times, truth[:, k]) for k, kind in enumerate(KINDS.values())]


def _turns(found: list[Event], times: Floats, truth: Floats) -> Turns:
    flips = [event for event in found if event.kind == "flip" and event.detail["sign"] > 0]
    peaks = [event for event in found if event.kind == "harmful peak"]
    if not flips or not peaks:
        raise ValueError("the sampled curve does not turn harmful beyond its noise; take more chains or draws")
    return Turns(flips[0], peaks[0], _turns_positive(times, truth), float(times[truth.argmax()]))


def _turns_positive(times: Floats, values: Floats) -> float:
    """Where a curve last turns positive before its maximum."""
    top = int(values.argmax())
    k = int(np.flatnonzero(values[:top] <= 0)[-1])
    return float(np.interp(0, values[k : k + 2], times[k : k + 2]))
