"""The local learning coefficient: how much the local posterior raises the training loss, from the draws of the BIF.

llc = n_beta (E[L_n(w)] - L_n(w*))                                                          (arXiv 2308.12108)
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import xarray as xr

from stagewise.influence.covariance import mean_and_stderr
from stagewise.influence.trusted import Traces, as_traces, numbered, ok_chains, over_checkpoints
from stagewise.traces.columns import Array, Indices, losses_of
from stagewise.traces.stretches import stretches


def llc(
    traces: Traces | str | Path, *, part: Literal["full", "even"] = "full", trusted_only: bool = True
) -> xr.Dataset:
    """Local learning coefficient at every checkpoint.

    Where the loss is quadratic with the (whitened) curvatures h_k, it is half the number of directions that the data
    hold tighter than the localisation gamma does,  1/2 sum_k n_beta h_k / (n_beta h_k + gamma),  so compare values of
    one n_beta and gamma only.

    A ``centred`` posterior leaves the slope at the checkpoint out of what moves the chains, and only that value, of
    curvature, is left: it is negative only where the loss curves downwards. In a posterior that is not centred the
    chains run downhill, and away from a minimum the value is lowered by the loss they gain on the way, often below
    zero. In both the slope adds to the noise of the draws, and so to the standard error. The even part under reflection
    about the checkpoint has no slope: for a centred posterior it estimates the same, but for terms of third order, with
    a much smaller error away from minima.

    Args:
        traces: loss traces, or the run folder that holds them.
        part: ``"even"`` takes the mean of each draw's loss and that at its reflection; for centred posteriors.
        trusted_only: leave out checkpoints whose chains cannot be trusted; attribute ``omitted`` says which and why.

    Returns:
        Dataset with ``value`` and ``stderr`` ``(step)``, without unit, and where checkpoints have chains in common
        ``replicates`` ``(step, replicate)``, the value by each chain that ended well at all checkpoints (or by each
        stretch of it, where chains are few).

    Raises:
        NoTrustedCheckpointError: no checkpoint can be trusted, with the reasons.
        ValueError: the even part is asked of traces without reflected losses, or of a posterior that is not centred;
            the draws are those of ``sampler="window"``, which are of no posterior.

    Example:
        >>> import torch, stagewise as sw
        >>> from stagewise.sampling.chains import sample_block
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> tree = sample_block(task, start, sw.LocalPosterior(window=10), sw.Chains(chains=8, draws=64))
        >>> traces = sw.TracesInMemory({0: tree})
        >>> learned = sw.llc(traces)
        >>> 0 < learned.value.item() < 5 / 2, learned.stderr.item() > 0
        (True, True)
    """
    if part not in ("full", "even"):
        raise ValueError(f"part must be 'full' or 'even', got {part!r}")
    traces = as_traces(traces)
    result = over_checkpoints(traces, traces.steps, trusted_only, lambda _step, tree: _at_checkpoint(tree, part))
    result.attrs |= {"estimator": "llc", "part": part, "units": "1"}
    for variable in result.data_vars.values():
        variable.attrs["units"] = "1"
    return result


def _at_checkpoint(tree: xr.DataTree, part: Literal["full", "even"]) -> xr.Dataset:
    if tree.attrs.get("sampler") == "window":
        raise ValueError(
            "the local learning coefficient is of a posterior, and the draws of sampler='window' are of none; use "
            "another sampler"
        )
    if part == "even" and not tree.attrs.get("centred", True):
        raise ValueError(
            "part='even' needs a centred posterior: chains that run downhill are not symmetric about the checkpoint; "
            "use part='full', or sample with LocalPosterior(centred=True)"
        )
    replicates = tree.attrs["n_beta"] * _rises(tree, part)
    value, stderr = mean_and_stderr(replicates)
    return numbered(xr.Dataset({"value": value, "stderr": stderr, "replicates": ("replicate", replicates)}), tree)


def _rises(tree: xr.DataTree, part: Literal["full", "even"]) -> Array:
    """Mean rise of the training loss above the checkpoint in every stretch of every good chain, ``(replicate,)``."""
    train = tree["train"].to_dataset().transpose("chain", "draw", ...)
    # By all chains, failed or not, so that replicates are cut alike at every checkpoint.
    pieces = stretches(tree["chains"].sizes["chain"], train.sizes["draw"])
    mean = mean_rise(train, ok_chains(tree), part)[:, train.sizes["draw"] % pieces :]
    rises: Array = mean.reshape(len(mean) * pieces, -1).mean(1)
    return rises


def mean_rise(train: xr.Dataset, kept: Indices, part: Literal["full", "even"]) -> Array:
    """Rise of the mean training loss above the checkpoint at every draw of the chains that are kept, nats."""
    # Sample by sample, because the rise is small beside the losses.
    rise = losses_of(train, kept, part) - train["loss_anchor"].values.astype(np.float64)
    share = train["share"].values
    mean: Array = (rise * (share / share.sum())).reshape(*rise.shape[:2], -1).sum(-1)
    return mean
