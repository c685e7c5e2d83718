"""What the chains of a run say to first order, known without their noise where they recorded it (``linear``).

It takes part in the influence of groups, samples and tokens. Correlations, the map of the samples and the doctor's
verdicts are of the draws alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.remainder import NoFirstOrderError
from stagewise.influence.response import response_influence
from stagewise.influence.trusted import NoTrustedCheckpointError, ReadOnce
from stagewise.results import FIRST_ORDER
from stagewise.run.analysis import Analysis, Stage
from stagewise.run.config import RunConfig
from stagewise.task import Task
from stagewise.varied import Per, by_itself


def solver(task: Task, trajectory: Trajectory, config: RunConfig, per: Per) -> Callable[..., xr.Dataset]:
    """Influence to first order under the law of the draws, as a function of ``steps``."""
    if config.sampling.sampler == "window":
        return partial(response_influence, task, trajectory, config.posterior, at="checkpoint", per=per)
    return partial(damped_influence, task, trajectory, config.posterior, curvature="hessian", per=per)


def first_order_stage(analysis: Analysis, per: Per) -> Stage | None:
    """Influence to first order of groups, samples or tokens; None where the losses were not recorded to it."""
    if not analysis.config.sampling.linear:
        return None
    name = FIRST_ORDER if per == by_itself(analysis.task) else f"{FIRST_ORDER} of {per}s"
    return Stage(name, "", analysis.digests, solver(analysis.task, analysis.trajectory, analysis.config, per))


def first_order(analysis: Analysis, per: Per | None = None, steps: Sequence[int] | None = None) -> xr.Dataset | None:
    """Influence to first order; None where the losses were not recorded to it.

    Args:
        analysis: the run.
        per: of groups, samples or tokens; default what the curves are of.
        steps: which checkpoints, default all that can be used.

    Returns:
        As of :func:`stagewise.damped_influence`, of no steps if need be: ``omitted`` says where it does not exist.
    """
    stage = first_order_stage(analysis, per or by_itself(analysis.task))
    if stage is None:
        return None
    wanted = analysis.digests if steps is None else steps
    digests = {step: analysis.digests[step] for step in wanted if step in analysis.digests}
    rows, reasons = analysis.each(replace(stage, digests=digests))
    found = (
        xr.concat(rows, "step", combine_attrs="override") if rows else xr.Dataset(coords={"step": np.array([], int)})
    )
    return found.assign_attrs(omitted=json.dumps(reasons))


def completed(estimate: Callable[..., xr.Dataset], known: xr.Dataset | None) -> xr.Dataset:
    """``estimate(first_order=known)``; by the draws alone at the steps for which it has no answer, which are named.

    They contradict it there, or it is of an earlier state of the run folder: without a step, or of other groups.
    """
    while known is not None:
        try:
            return estimate(first_order=known)
        except NoFirstOrderError as error:
            known = _without(known, error.steps)
    return estimate()


def _without(known: xr.Dataset, steps: Mapping[int, str]) -> xr.Dataset:
    omitted = json.loads(known.attrs["omitted"]) | {str(step): reason for step, reason in steps.items()}
    return known.drop_sel(step=list(steps), errors="ignore").assign_attrs(omitted=json.dumps(omitted))


def sampled_influence(traces: ReadOnce, known: xr.Dataset | None) -> xr.Dataset | None:
    """Group influence at every checkpoint that can be sampled, with what is known of it; None if there is none."""
    try:
        return completed(partial(bif, traces), known) if traces.steps else None
    except NoTrustedCheckpointError:
        return None
