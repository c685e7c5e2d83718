"""Whether draws are enough: the error of the influence they give, beside its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from stagewise.influence.bif import bif
from stagewise.influence.trusted import TracesInMemory
from stagewise.traces.diagnostics import diagnose
from stagewise.traces.verdicts import UNTRUSTED

_TOO_SHORT = ("cannot say", "not converged")


def relative_error(tree: xr.DataTree, labels: Mapping[str, Any] | None = None) -> float:
    """Standard error of the influence between groups in units of its size, both root mean square over all pairs.

    Where there is nothing but noise it is close to 1.

    Args:
        tree: the traces of a checkpoint.
        labels: of the groups, see :attr:`stagewise.traces.store.TraceStore.labels`; samples without.

    Returns:
        Infinite where the chains do not agree yet; NaN where the posterior or the sampler is at fault, which more draws
        do not mend.
    """
    verdict = str(diagnose(tree, labels)["verdict"].item())
    if verdict in UNTRUSTED:
        return math.inf if verdict in _TOO_SHORT else math.nan
    found = bif(TracesInMemory({0: tree}, labels), trusted_only=False)
    error, size = (float(np.sqrt(np.square(found[name].values).mean())) for name in ("stderr", "value"))
    return error / size if size > 0 else math.nan
