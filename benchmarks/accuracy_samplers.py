"""The samplers of accuracy_per_gradient.py: influence by groups of as many chains as a budget of gradients pays for."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import xarray as xr
from accuracy_devinterp import DRAWS
from accuracy_problems import Place
from torch import Tensor

import stagewise as sw
from stagewise.derivatives import Product, hessian_product, mean_gradient
from stagewise.influence import damped
from stagewise.influence.covariance import covariance_replicates
from stagewise.influence.precision import relative_error
from stagewise.sampling import sample_block
from stagewise.sampling.base import Gradient
from stagewise.sampling.gradient import potential_gradient
from stagewise.sampling.rmsprop_sgld import RMSpropSGLD
from stagewise.traces.columns import Array

BUDGETS = (1000, 4000, 16000)
CHAIN, SLOW_CHAIN = 1000, 4000  # gradients of one chain; of overdamped chains, which are better long

ByBudget = dict[int, list[Array]]
"""Influence by several groups of chains, for every budget of a group."""


class Setting(NamedTuple):
    """Of RMSprop-SGLD: the coordinates, see accuracy_devinterp.py, learning rate and chains."""

    coordinates: str
    rate: str
    chains: int


Traces = dict[Setting, tuple[Array, Array]]
"""Mean losses of classes along the draws ``(chain, draw, class)``, of the training set and of the queries."""

Drawing = Callable[[Place, list[Setting]], Traces]


def grouped(chains: int, cost: int, estimate: Callable[[slice], Array]) -> ByBudget:
    """Of all disjoint groups of chains that a budget pays for."""
    sizes = {budget: budget // cost for budget in BUDGETS if cost <= budget <= cost * chains}
    return {
        budget: [estimate(slice(start, start + size)) for start in range(0, chains, size)]
        for budget, size in sizes.items()
    }


# RMSprop-SGLD with the settings of devinterp, by that library or by this package's sampler


def by_budget(place: Place, traces: tuple[Array, Array]) -> ByBudget:
    """Influence is minus the covariance of losses, times the weight of a sample; devinterp's is the covariance."""
    train, query = traces

    def estimate(group: slice) -> Array:
        found: Array = -place.weight * covariance_replicates(train[group], query[group]).mean(0)
        return found

    return grouped(len(train), CHAIN, estimate)


def by_this_package(place: Place, settings: list[Setting]) -> Traces:
    """Every chain with minibatches of its own."""
    return {setting: _own(place, setting) for setting in settings}


def _own(place: Place, setting: Setting) -> tuple[Array, Array]:
    density, batch, chains = place.density, place.problem.batch, setting.chains
    plain = potential_gradient(density, chains, batch, False, "stacked", torch.Generator().manual_seed(0))
    scale = density.scale
    to_u = torch.ones_like(scale) if setting.coordinates == "whitened" else torch.where(scale > 0, 1 / scale, 0.0)

    def gradient(x: Tensor) -> Gradient:
        of_u = plain(x * to_u)
        return Gradient(of_u.potential * to_u, of_u.loss * to_u)

    sampler, noise = RMSpropSGLD(float(setting.rate)), torch.Generator().manual_seed(0)
    state, drawn = sampler.init(torch.zeros(chains, len(scale)), noise), []
    for step in range(_steps(place)):
        state = sampler.step(state, gradient, noise)
        if step % (_steps(place) // DRAWS) == 0:
            drawn.append(place.classes(state.position * to_u))
    train, query = (torch.stack(losses, 1).numpy() for losses in zip(*drawn, strict=True))
    return train, query


def _steps(place: Place) -> int:
    """Of a chain with minibatches, rounded down to whole draws."""
    steps = CHAIN * len(place.problem.task.train) // place.problem.batch
    return steps - steps % DRAWS


def by_devinterp(python: str, place: Place, settings: list[Setting]) -> Traces:
    """In the other environment.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.pt", Path(folder) / "found.npz"
        torch.save(exported(place), given)
        script = str(Path(__file__).with_name("accuracy_devinterp.py"))
        command = [python, script, str(given), str(found), *(":".join(map(str, one)) for one in settings)]
        environment = os.environ | {"PYTHONPATH": str(Path(sw.__file__).parents[1])}  # of the network's class
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        with np.load(found) as losses:
            return {one: _classes(place, losses, f"{one.coordinates}:{one.rate}") for one in settings}


def _classes(place: Place, losses: Any, name: str) -> tuple[Array, Array]:
    flat = (losses[f"{name}:{data}"].astype(np.float64) for data in ("train", "query"))
    rows = (place.problem.train.numpy(), place.problem.query.numpy())
    train, query = (each.reshape(*each.shape[:2], -1) @ row.T for each, row in zip(flat, rows, strict=True))
    return train, query


def exported(place: Place) -> dict[str, Any]:
    """The network, its data, and the posterior; its slope is zero where it is not centred."""
    density, problem = place.density, place.problem
    (train, targets), (query, answers) = map(problem.pairs, problem.batches)
    return {
        "model": problem.task.model,
        "names": density.vector.names,
        "shapes": density.vector.shapes,
        "anchor": density.anchor,
        "scale": density.scale.contiguous(),
        "slope": mean_gradient(density, density.origin, problem.task.train),
        "gamma": density.gamma,
        "n_beta": density.n_beta,
        "inputs": torch.cat([train, query]),
        "targets": torch.cat([targets, answers]),
        "train": len(train),
        "batch": problem.batch,
        "steps": _steps(place),
    }


# Samplers of the package


def chains_of(sampling: sw.Chains, cost: int, price: int, place: Place) -> ByBudget:
    """Of chains that cost so many gradients each, at so many gradients a step."""
    task, chains = place.problem.task, BUDGETS[-1] // cost
    few = replace(sampling, chains=1, draws=1)
    facts = sample_block(task, place.checkpoint, place.posterior, few).attrs
    draws = (cost // price - facts["burn_in"]) // facts["thinning"]
    whole = replace(sampling, chains=chains, draws=draws, reflect=False, single_tokens=True)
    tree = sample_block(task, place.checkpoint, place.posterior, whole)
    known = {"first_order": solved(place).influence} if sampling.linear else {}

    def estimate(group: slice) -> Array:
        nodes = {node.path: node.to_dataset().isel(chain=group, missing_dims="ignore") for node in tree.subtree}
        part = xr.DataTree.from_dict(nodes)
        part.attrs = tree.attrs
        traces = sw.TracesInMemory({place.step: part}, place.problem.labels)
        return by_class(sw.bif(traces, trusted_only=False, **known))

    return grouped(chains, cost, estimate)


def by_its_own_rule(place: Place) -> ByBudget:
    """Of the default chains with ``draws="auto"``: what they spent, and what they found."""
    sampling, labels = sw.Chains(draws="auto", reflect=False, single_tokens=True), place.problem.labels
    error = partial(relative_error, labels=labels)
    tree = sample_block(place.problem.task, place.checkpoint, place.posterior, sampling, error=error)
    steps = tree.attrs["burn_in"] + tree["train"].sizes["draw"] * tree.attrs["thinning"]
    found = sw.bif(sw.TracesInMemory({place.step: tree}, labels), trusted_only=False)
    return {sampling.chains * steps: [by_class(found)]}


def by_class(found: xr.Dataset) -> Array:
    """The value at its only step, classes in order."""
    order = {"train": sorted(found["train"].values), "query": sorted(found["query"].values)}
    value: Array = found["value"][0].sel(order).transpose("train", "query").values
    return value


class Solved(NamedTuple):
    """First order at one checkpoint, and how many gradients its products with the Hessian cost."""

    influence: xr.Dataset
    gradients: int


def solved(place: Place) -> Solved:
    products, problem = 0, place.problem

    def counted(*where: Any) -> Product:
        product = hessian_product(*where)

        def counting(vectors: Tensor) -> Tensor:
            nonlocal products
            products += len(vectors)
            return product(vectors)

        return counting

    with mock.patch.object(damped, "hessian_product", counted):
        found = sw.damped_influence(problem.task, problem.run, place.posterior, curvature="hessian", steps=[place.step])
    return Solved(found, 2 * products)
