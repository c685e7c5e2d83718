"""The local learning coefficient: how much the local posterior raises the training loss, from the draws of the BIF.

llc = n_beta (E[L_n(w)] - L_n(w*))                                                          (arXiv 2308.12108)
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from stagewise.influence.covariance import Array, mean_and_stderr, stretches
from stagewise.influence.trusted import Traces, numbered, ok_chains, over_checkpoints


def llc(traces: Traces, *, trusted_only: bool = True) -> xr.Dataset:
    """Local learning coefficient at every checkpoint.

    Where the loss is quadratic with the (whitened) curvatures h_k, it is half the number of directions that the data
    hold tighter than the localisation gamma does,  1/2 sum_k n_beta h_k / (n_beta h_k + gamma),  so compare values of
    one n_beta and gamma only.

    A ``centred`` posterior leaves the slope at the checkpoint out of what moves the chains, and only that value, of
    curvature, is left: it is negative only where the loss curves downwards. In a posterior that is not centred the
    chains run downhill, and away from a minimum the value is lowered by the loss they gain on the way, often below
    zero. In both the slope adds to the noise of the draws, and so to the standard error.

    Args:
        traces: loss traces.
        trusted_only: leave out checkpoints whose chains cannot be trusted; attribute ``omitted`` says which and why.

    Returns:
        Dataset with ``value`` and ``stderr`` ``(step)``, without unit, and where checkpoints have chains in common
        ``replicates`` ``(step, replicate)``, the value by each chain that ended well at all checkpoints (or by each
        stretch of it, where chains are few).

    Raises:
        NoTrustedCheckpointError: no checkpoint can be trusted, with the reasons.
    """
    result = over_checkpoints(traces, traces.steps, trusted_only, lambda _step, tree: _at_checkpoint(tree))
    result.attrs |= {"estimator": "llc", "units": "1"}
    for variable in result.data_vars.values():
        variable.attrs["units"] = "1"
    return result


def _at_checkpoint(tree: xr.DataTree) -> xr.Dataset:
    replicates = tree.attrs["n_beta"] * _rises(tree)
    value, stderr = mean_and_stderr(replicates)
    return numbered(xr.Dataset({"value": value, "stderr": stderr, "replicates": ("replicate", replicates)}), tree)


def _rises(tree: xr.DataTree) -> Array:
    """Mean rise of the training loss above the checkpoint in every stretch of every good chain, ``(replicate,)``."""
    train = tree["train"].to_dataset()
    # By all chains, failed or not, so that replicates are cut alike at every checkpoint.
    pieces = stretches(tree["chains"].sizes["chain"], train.sizes["draw"])
    kept = train.isel(chain=ok_chains(tree), draw=slice(train.sizes["draw"] % pieces, None))
    # Sample by sample, because the rise is small beside the losses.
    rise = kept["loss"].astype(np.float64) - kept["loss_anchor"].astype(np.float64)
    of_draws = rise.transpose("chain", "draw", ...).values
    rises: Array = of_draws.reshape(len(of_draws) * pieces, -1).mean(1)
    return rises
