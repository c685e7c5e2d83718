"""Results by name: measured effects and influences as labelled arrays ``(step, train, query)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from stagewise.groups import Groups

Array = np.ndarray[Any, np.dtype[np.float64]]

DIMS = ("step", "train", "query")


def effect_dataset(
    effect: Array,
    stderr: Array | None,
    steps: Sequence[int],
    trained: Groups,
    queried: Groups,
    weight: float,
    attrs: dict[str, Any],
) -> xr.Dataset:
    """Measured effects, changed minus unchanged loss, in nats: ``effect``, and ``effect_stderr`` if known."""
    about = {"unit": "nats", "sign": "loss with the group's weight changed minus unchanged"}
    variables = {"effect": (DIMS, effect, about)}
    if stderr is not None:
        variables["effect_stderr"] = (DIMS, stderr, {"unit": "nats", "over": "batch orders"})
    coords = {
        "step": list(steps),
        "train": list(trained.labels),
        "train_size": ("train", list(trained.sizes)),
        "query": list(queried.labels),
    }
    meaning = "positive = helpful" if weight < 1 else "negative = helpful"
    return xr.Dataset(variables, coords, {"sign": meaning, "weight": weight, **attrs})


def influence_dataset(
    value: Array, steps: Sequence[int], trained: Groups, queried: Groups, attrs: dict[str, Any]
) -> xr.Dataset:
    """Influences without noise: ``value`` and ``stderr`` (zero), in nats per unit weight of one sample."""
    units = {"units": "nats per unit weight"}
    coords = {
        "step": list(steps),
        "train": list(trained.labels),
        "query": list(queried.labels),
        "train_size": ("train", list(trained.sizes)),
        "query_size": ("query", list(queried.sizes)),
    }
    variables = {"value": (DIMS, value, units), "stderr": (DIMS, np.zeros_like(value), units)}
    sign = "negative = helpful: more weight on the training data lowers the query loss"
    return xr.Dataset(variables, coords, {**units, "sign": sign, **attrs})
