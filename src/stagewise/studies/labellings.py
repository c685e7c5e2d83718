"""Several ways to label the same tokens, all in one replay: backwards, the number of train groups costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from stagewise.labels import NONE
from stagewise.studies.chance import Labels

_BETWEEN = "/"


def joint(labellings: Sequence[Labels]) -> Labels:
    """The labels of every token in all labellings together, ``one/other/...``."""
    together, *others = labellings
    for labels in others:
        together = np.char.add(np.char.add(together, _BETWEEN), labels)
    return together


def summed(influence: xr.Dataset, place: int) -> xr.Dataset:
    """Influence of the groups of one labelling from that of joint groups.

    Args:
        influence: ``value`` and ``stderr`` ``(step, train, query)`` with ``train_size``; errors are 0 (known batches)
            or NaN, and stay so.
        place: of the labelling.
    """
    names = [str(label).split(_BETWEEN)[place] for label in influence["train"].values]
    by = xr.DataArray(names, dims="train", name="train")
    sizes = influence["train_size"].drop_vars("train").groupby(by).sum()
    sums = (
        (influence[["value", "stderr"]] * influence["train_size"])
        .drop_vars(["train", "train_size"])
        .groupby(by)
        .sum(skipna=False)
    )
    means = (sums / sizes).assign_coords(train_size=sizes).transpose("step", "train", "query")
    return means.sel(train=means["train"] != NONE).assign_attrs(influence.attrs)
