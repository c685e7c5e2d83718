"""Results by name: effects and influences as labelled arrays ``(step, train, query)``."""

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
    about = {"units": "nats", "sign": "loss with the group's weight changed minus unchanged"}
    variables = {"effect": (DIMS, effect, about)}
    if stderr is not None:
        variables["effect_stderr"] = (DIMS, stderr, {"units": "nats", "over": "batch orders"})
    meaning = "positive = helpful" if weight < 1 else "negative = helpful"
    facts = {"units": "nats", "sign": meaning, "weight": weight, **attrs}
    return xr.Dataset(variables, _coords(steps, trained, queried), facts)


def influence_dataset(
    value: Array, stderr: Array | None, steps: Sequence[int], trained: Groups, queried: Groups, attrs: dict[str, Any]
) -> xr.Dataset:
    """Influences in nats per unit weight of one sample: ``value`` and ``stderr``, zero where there is none."""
    units = {"units": "nats per unit weight"}
    variables = {
        "value": (DIMS, value, units),
        "stderr": (DIMS, np.zeros_like(value) if stderr is None else stderr, units),
    }
    sign = "negative = helpful: more weight on the training data lowers the query loss"
    return xr.Dataset(
        variables, _coords(steps, trained, queried), {**units, "sign": sign, **member_of(trained), **attrs}
    )


def member_of(trained: Groups) -> dict[str, str]:
    """The attribute that says of what unit weight is, where it is not of a sample."""
    return {"member": "token"} if trained.tokens else {}


def _coords(steps: Sequence[int], trained: Groups, queried: Groups) -> dict[str, Any]:
    return {
        "step": list(steps),
        "train": list(trained.labels),
        "query": list(queried.labels),
        "train_size": ("train", list(trained.sizes)),
        "query_size": ("query", list(queried.sizes)),
    }
