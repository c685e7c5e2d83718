"""Every estimator of influence on one training run, from a random start, at the same moments.

Three things are estimated: the influence of the whole run up to a moment; that of a window of training at the moment;
and what is left at the end of training, taken for all moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from stagewise.baselines.source import source
from stagewise.baselines.tracin import tracin
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.retraining.unrolling import unrolled_influence
from stagewise.sampling.curvature import extreme_curvature
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.network import Run, record
from stagewise.studies.hierarchy.settings import EVERY_TIME, RATE, WINDOW
from stagewise.studies.hierarchy.theory.removal import leave_one_out
from stagewise.studies.hierarchy.theory.response import first_order_response
from stagewise.studies.hierarchy.theory.tree import Floats

Estimates = dict[str, xr.Dataset]
"""Influence by name: ``value`` (step, train, query), nats per unit weight, negative = helpful."""


def whole_run(lab: Lab, run: Run, steps: Sequence[int]) -> Estimates:
    """Of all training up to each step."""
    first, second = run.layers([0])
    modes, strengths = lab.predicted_strengths(run, EVERY_TIME[:1])
    response = first_order_response(modes, strengths[0], EVERY_TIME)
    exact = leave_one_out(lab.items.targets.T, first[0], second[0], RATE * np.array(steps))
    return {
        "leave-one-out": labelled(lab, exact, steps),
        "first order": labelled(lab, response[list(steps)], steps),
        "unrolling": unrolled_influence(run.task, run.start, run.order, steps),
        "SOURCE": source(run.task, run.trajectory),
        "TracIn": tracin(run.task, run.trajectory),
    }


def moment(lab: Lab, run: Run, steps: Sequence[int]) -> Estimates:
    """At each step: of a short window, or, damped, of a quadratic loss in place of all training so far."""
    damped = [
        damped_influence(run.task, run.trajectory, training_so_far(step), curvature="exact", steps=[step])
        for step in steps
    ]
    return {
        "BIF, sampled": sampled(lab, steps),
        "gradient product": gradient_product(run.task, run.trajectory, LocalPosterior(window=WINDOW), steps=steps),
        "damped": xr.concat(damped, "step", data_vars="minimal", coords="minimal", compat="override"),
    }


def endpoint(estimates: Estimates, steps: Sequence[int]) -> Estimates:
    """What is found at the last step, for all steps."""
    last = {name: estimate[["value"]].sel(step=steps[-1], drop=True) for name, estimate in estimates.items()}
    return {name: estimate.expand_dims(step=list(steps)) for name, estimate in last.items()}


def recorded(lab: Lab, steps: Sequence[int]) -> Run:
    """The random run up to the last step, with checkpoints at the steps and at the lab's."""
    kept = {*steps, *(step for step in lab.steps if step < steps[-1])}
    return record(lab.random.task, lab.random.optimizer, steps[-1], sorted(kept))


def sampled(lab: Lab, steps: Sequence[int]) -> xr.Dataset:
    """The Bayesian influence function of a window, where its chains can be trusted."""
    task = lab.run("random", dtype=torch.float32).task
    run = record(task, lab.random.optimizer, steps[-1], steps)
    return bif(lab.sample(run, lab.window_posterior, "attribution"))


def training_so_far(step: int) -> LocalPosterior:
    """The damping that stands for ``step`` updates: it needs no tuning."""
    return LocalPosterior(window=step)


def localised(run: Run, steps: Sequence[int]) -> list[bool]:
    """Where the damped influence can be trusted: where its damping outweighs all negative curvature."""
    densities = [training_so_far(step).at(run.task, run.trajectory.load(step)) for step in steps]
    return [extreme_curvature(density).localised(density) for density in densities]


def labelled(lab: Lab, value: Floats, steps: Sequence[int]) -> xr.Dataset:
    """Influence of single items, ``(step, train, query)``, by name."""
    names = lab.items.names
    coords = {"step": list(steps), "train": names, "query": names, "train_size": ("train", [1] * len(names))}
    return xr.Dataset({"value": (("step", "train", "query"), value)}, coords)
