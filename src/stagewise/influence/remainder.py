"""Covariances of losses of which only what first order leaves is sampled.

    Cov(l_i, l_j) = g_i^T Sigma g_j  +  [ Cov(l_i, l_j) - Cov(t_i, t_j) ],        t_i = l_i(w*) + g_i . (w - w*)

The first term is known without draws; the second, from draws, has little noise where losses are nearly linear, since
t_i has nearly the noise of l_i. Draws of a window's own Gaussian have a symmetric law, under which odd and even parts
of losses are uncorrelated: there the noise of their products is left out too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from stagewise.groups import Labels
from stagewise.influence.covariance import Centring, mean_and_stderr
from stagewise.influence.pairs import Kind
from stagewise.influence.trusted import DataSets, data_sets
from stagewise.traces.columns import Part, Recorded

# Standard errors by which the draws' own estimate of the first term may be larger or smaller than it.
_FAR = 8


class NoFirstOrderError(ValueError):
    """The first order that is given has no answer at some steps, or the draws there show another.

    Attributes:
        steps: the reason at each of them.
    """

    def __init__(self, steps: Mapping[int, str]) -> None:
        super().__init__(dict(steps))
        self.steps = dict(steps)

    def __str__(self) -> str:
        return "; ".join(self.steps.values())


def check_question(kind: Kind, centring: Centring, part: Part, self_pairs: bool) -> None:
    """Refuse what has no first order, or none that is known.

    Raises:
        ValueError: another kind than covariance, the even part, chain means, or groups without their self pairs.
    """
    asked = {"kind": (kind, "covariance"), "centring": (centring, "pooled"), "self_pairs": (self_pairs, True)}
    for name, (got, expected) in asked.items():
        if got != expected:
            raise ValueError(f"first_order= is known of {name}={expected!r} only, got {got!r}; leave one of them out")
    if part == "even":
        raise ValueError("first_order= is no part of part='even'; leave one of them out")


def remainder(
    tree: xr.DataTree,
    labels: tuple[Labels | None, dict[str, Labels | None]],
    grouped: bool,
    part: Part,
    tokens: bool,
) -> DataSets:
    """Both sides, with the traces whose covariances are added and subtracted.

    Raises:
        ValueError: the losses were not recorded to first order, or as :func:`data_sets`.
    """
    if "loss_linear" not in tree["train"]:
        raise ValueError(
            f"first_order= needs traces sampled with linear=True; those at step {tree.attrs.get('step')} were not"
        )

    def sides(recorded: Recorded) -> DataSets:
        return data_sets(tree, labels, grouped, recorded, tokens, self_pairs=True)

    symmetric = part == "full" and tree.attrs["sampler"] == "window" and "loss_reflected" in tree["train"]
    first = sides("odd" if symmetric else part)
    signed = [(1.0, sides("even"))] if symmetric else []
    signed.append((-1.0, sides("linear")))
    queries = [
        (replace(query, also=[(sign, other.queries[k][0].traces) for sign, other in signed]), shared)
        for k, (query, shared) in enumerate(first.queries)
    ]
    train = replace(first.train, also=[(sign, other.train.traces) for sign, other in signed])
    return first._replace(train=train, queries=queries)


def completed(
    found: xr.Dataset, linear: xr.Dataset, first_order: xr.Dataset, facts: dict[Any, Any], tokens: bool
) -> xr.Dataset:
    """The remainder with the first order of the same posterior, groups and step.

    Args:
        found: the remainder ``(train, query)``.
        linear: the draws' own estimate of the first order.
        first_order: at all checkpoints.
        facts: of the checkpoint's traces.
        tokens: whether traces are of single tokens; groups of queries count theirs then, not samples.

    Raises:
        ValueError: it is of another posterior.
        NoFirstOrderError: it lacks the step, is of another grouping, or is not what the draws show.
    """
    _check_posterior(first_order.attrs, facts)
    if (step := facts["step"]) not in first_order["step"].values:
        raise NoFirstOrderError({step: f"first_order lacks step {step}; compute it at every step of these traces"})
    exact = first_order.sel(step=step, drop=True)
    for side in ("train", "query"):
        ours, theirs = (
            dict(zip(of[side].values.tolist(), of[f"{side}_size"].values.tolist(), strict=True))
            for of in (found, exact)
        )
        if ours.keys() != theirs.keys() if tokens and side == "query" else ours != theirs:
            raise NoFirstOrderError(
                {
                    step: f"first_order is of the {side} groups {_short(theirs)}, these traces are of {_short(ours)}; "
                    "group both alike"
                }
            )
    exact = exact.sel(train=found["train"].values, query=found["query"].values).transpose("train", "query")
    value, error = exact["value"].values, exact["stderr"].values
    _check_draws(linear, value, step)
    found = found.assign(value=found["value"] + value, stderr=(found["stderr"] ** 2 + error**2) ** 0.5)
    return found.assign(replicates=found["replicates"] + value) if "replicates" in found else found


def omitted(first_order: xr.Dataset) -> dict[int, str]:
    """The steps at which it does not exist, and why, as it says itself."""
    return {int(step): reason for step, reason in json.loads(first_order.attrs.get("omitted", "{}")).items()}


def _check_posterior(attrs: dict[Any, Any], facts: dict[Any, Any]) -> None:
    """The law of the draws is that of the dataset."""
    window = facts["sampler"] == "window"
    wanted = {"estimator": "response (hessian)" if window else "damped influence (hessian)", "metric": facts["metric"]}
    wanted |= {"at": "checkpoint"} if window else {}
    wanted |= {name: facts[name] for name in (("window",) if facts.get("window") else ("gamma", "n_beta"))}
    for name, expected in wanted.items():
        if attrs.get(name) != expected:
            advice = "response_influence(at='checkpoint')" if window else "damped_influence(curvature='hessian')"
            raise ValueError(
                f"first_order has {name} {attrs.get(name)!r}, these traces need {expected!r}; use {advice} of the same "
                "posterior"
            )


def _check_draws(linear: xr.Dataset, value: np.ndarray[Any, np.dtype[np.float64]], step: int) -> None:
    """What no attribute tells is seen in the draws: other parameters that move, other weights, another run.

    Only where their replicates are kept. Variances of a few draws are skewed, so that 8 standard errors are needed.
    """
    norm = float((value**2).sum())
    if not np.isfinite(norm):
        raise NoFirstOrderError({step: f"first_order is not finite at step {step}; leave that step out"})
    if "replicates" not in linear or norm == 0:
        return
    mean, error = mean_and_stderr((linear["replicates"].values * value).sum((1, 2)) / norm)
    if abs(mean - 1) > _FAR * error:
        raise NoFirstOrderError(
            {
                step: f"first_order at step {step} is not what the draws show of it, which is {mean:.2g} times as "
                f"large, with a standard error of {error:.1g}; compute it for the run, data and parameters of these "
                "traces"
            }
        )


def _short(names: dict[str, int]) -> str:
    """Groups with their sizes, the first few."""
    shown = ", ".join(f"{name} ({size})" for name, size in list(names.items())[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
