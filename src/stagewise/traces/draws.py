"""What a person looks at to see whether chains agree: their mean training loss, draw by draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import xarray as xr

_ALONG = ("chain", "draw")


class Traces(Protocol):
    """What loads the draws of a step, as a store does."""

    @property
    def steps(self) -> Sequence[int]:
        """Those that have draws."""
        ...

    def load(self, step: int) -> xr.DataTree:
        """All chains of one step."""
        ...


def mean_losses_of_draws(traces: Traces) -> xr.DataArray | None:
    """Mean training loss along the draws of every chain.

    Returns:
        (step, chain, draw), nats; NaN where a step has fewer draws. None where single losses were not kept.
    """
    found = {}
    for step in traces.steps:
        train = traces.load(step).children.get("train")
        if train is not None and "loss" in train and "share" in train:
            mean = (train["loss"] * train["share"]).sum([dim for dim in train["loss"].dims if dim not in _ALONG])
            found[step] = mean.assign_coords(draw=range(mean.sizes["draw"]))
    return xr.concat(list(found.values()), xr.Variable("step", list(found)), join="outer") if found else None
