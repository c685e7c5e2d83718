"""Susceptibilities: how the parts of a network answer to more of a datum.

    chi(C, m) = - Cov_C( L, l_m - L )                                              (arXiv 2504.18274)

L is the mean training loss, l_m the loss of datum m, and Cov_C is over the local posterior in which the weights of
component C alone move, the others staying at the checkpoint. The observable of a component is its rise of the loss,
phi_C = L(w) - L(w*) at such w. Adding h (l_m - L) to the loss changes its mean by d<phi_C> / dh = n_beta chi(C, m);
chi is left without that factor, as in the literature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.groups import Labels
from stagewise.influence.covariance import covariance_replicates, group_sums, mean_and_stderr
from stagewise.influence.llc import mean_rise
from stagewise.influence.trusted import (
    NoTrustedCheckpointError,
    Traces,
    as_traces,
    carried_labels,
    joined,
    numbered,
    ok_chains,
    over_checkpoints,
)
from stagewise.traces.columns import Array, columns
from stagewise.traces.stretches import stretches


def susceptibilities(
    components: Mapping[str, Traces | str | Path],
    *,
    groups: Labels | None = None,
    grouped: bool = False,
    tokens: bool = False,
    standardised: bool = False,
    trusted_only: bool = True,
) -> xr.Dataset:
    """Susceptibility of every component to every training sample, token or group, at every checkpoint.

    Negative is *expression*: where the weights of the component raise the mean loss they raise that of the datum more
    than others', so that the component serves it, and more of it holds the component tighter. Positive is suppression.

    Sample every component with the same settings but for ``LocalPosterior(parameters=[...])``, and with ``n_beta``
    given: values fall with its square, so that other choices cannot be compared. L is the mean over the samples whose
    losses were traced, the candidates.

    Args:
        components: loss traces, or the run folder that holds them, by the component's name.
        groups: label of every training sample ``(sample,)`` or token ``(sample, token)``; l_m is then the mean loss of
            a group.
        grouped: by the labels that the traces carry, where none are given here.
        tokens: one column per token.
        standardised: every component's values are brought to mean 0 and variance 1 over the data, and the mean over
            the components taken out of every datum: what is left is in which of them it differs. Without unit.
        trusted_only: leave out checkpoints at which the chains of any component cannot be trusted; attribute
            ``omitted`` says which and why.

    Returns:
        Dataset with ``value`` and ``stderr`` ``(step, component, sample)``, nats squared, and ``replicates``
        ``(step, component, replicate, sample)`` of what is not standardised, over the chains that ended well in all;
        samples are called by their number, tokens ``"sample/token"``, groups by their label. The mean of the values
        over all data, by their share in the training objective, is 0.

    Raises:
        NoTrustedCheckpointError: no checkpoint can be trusted in all components, with the reasons.
        ValueError: there are no components, or fewer than two to standardise; their n_beta or data differ; labels do
            not fit the traces; or the draws are those of ``sampler="window"``, which are of no posterior.

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
        >>> def traces_of(pattern):
        ...     posterior = sw.LocalPosterior(window=10, n_beta=40.0, parameters=(pattern,))
        ...     return sw.TracesInMemory({0: sample_block(task, start, posterior, sw.Chains(chains=8, draws=64))})
        >>> parts = {"left": traces_of("weight[:, :2]"), "right": traces_of("weight[:, 2:]")}
        >>> chi = sw.susceptibilities(parts, groups=list("aabb"))
        >>> chi.value.dims, (chi.value.sel(component="left", sample="a") < 0).all().item()
        (('step', 'component', 'sample'), True)
    """
    if len(components) < 1 + standardised:
        raise ValueError(f"components: got {len(components)}, expected {1 + standardised} or more; sample the others")

    found: list[xr.Dataset] = []
    omitted: dict[str, str] = {}
    for name, given in components.items():
        traces = as_traces(given)
        labels, _ = carried_labels(traces, groups, {}, grouped)
        estimate = partial(_at_checkpoint, groups=labels, tokens=tokens)
        one = over_checkpoints(traces, traces.steps, trusted_only, estimate)
        omitted |= {step: f"{name}: {reason}" for step, reason in json.loads(one.attrs["omitted"]).items()}
        found.append(one.expand_dims(component=[name]))
    result = _together(found, omitted)
    if standardised:
        result = _standardised(result)
    facts = {name: value for name, value in found[0].attrs.items() if name != "omitted"}
    units = "1" if standardised else "nats squared"
    result.attrs = facts | {
        "omitted": json.dumps(omitted),
        "estimator": "susceptibility",
        "units": units,
        "sign": "negative = expression: the component serves the datum more than others",
    }
    for name in ("value", "stderr"):
        result[name].attrs["units"] = units
    return result


def _at_checkpoint(_step: int, tree: xr.DataTree, groups: Labels | None, tokens: bool) -> xr.Dataset:
    """Of one component: ``value``, ``stderr`` and ``replicates`` by sample."""
    if tree.attrs.get("sampler") == "window":
        raise ValueError(
            "susceptibilities are of a posterior, and the draws of sampler='window' are of none; use another sampler"
        )
    train, kept = tree["train"].to_dataset().transpose("chain", "draw", ...), ok_chains(tree)
    rows = columns(train, kept, groups, "groups", tokens=tokens)
    rise = mean_rise(train, kept, "full")[..., None]
    contrast = group_sums(rows.traces, rows.rows) / rows.sizes - rise  # a constant, L(w*), is in no covariance
    # By all chains, failed or not, so that replicates are cut alike at every checkpoint.
    pieces = stretches(tree["chains"].sizes["chain"], train.sizes["draw"])
    replicates = -covariance_replicates(rise, contrast, pieces=pieces)[:, 0]
    value, stderr = mean_and_stderr(replicates)
    data = {"value": ("sample", value), "stderr": ("sample", stderr), "n_beta": tree.attrs["n_beta"]}
    return numbered(
        xr.Dataset(data | {"replicates": (("replicate", "sample"), replicates)}, {"sample": rows.names}), tree
    )


def _together(found: list[xr.Dataset], omitted: Mapping[str, str]) -> xr.Dataset:
    """All components at the checkpoints that they have in common."""
    steps = sorted(set.intersection(*(set(one["step"].values.tolist()) for one in found)))
    if not steps:
        raise NoTrustedCheckpointError(f"the components have no checkpoint in common that can be trusted: {omitted}")
    samples = [one["sample"].values.tolist() for one in found]
    if other := next((names for names in samples if names != samples[0]), None):
        raise ValueError(f"components: the data differ, {samples[0][:10]} and {other[:10]}; sample one task")
    result = joined([one.sel(step=steps) for one in found], "component")
    if (np.ptp(result["n_beta"].transpose("step", "component").values, 1) > 0).any():
        raise ValueError(
            f"components were sampled at different n_beta, {np.unique(result['n_beta']).tolist()}, and cannot be "
            "compared; give LocalPosterior(n_beta=...)"
        )
    return result.drop_vars("n_beta").transpose("step", "component", ...)


def _standardised(result: xr.Dataset) -> xr.Dataset:
    """The values standardised; standard errors by the jackknife over replicates of all components at once."""
    if "replicates" not in result:
        raise ValueError("the components have no chains in common that ended well; run more chains")
    replicates = result["replicates"].transpose("replicate", "step", "component", "sample").values
    left_out = _contrasts((replicates.sum(0) - replicates) / (len(replicates) - 1))
    stderr = left_out.std(0) * np.sqrt(len(replicates) - 1)
    dims = ("step", "component", "sample")
    return result.assign(value=(dims, _contrasts(result["value"].transpose(*dims).values)), stderr=(dims, stderr))


def _contrasts(values: Array) -> Array:
    """Mean 0 and variance 1 over the last axis, then mean 0 over the one before."""
    centred = values - values.mean(-1, keepdims=True)
    spread = centred.std(-1, keepdims=True)
    scores = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    contrasts: Array = scores - scores.mean(-2, keepdims=True)
    return contrasts
