"""Error of class-to-class influence per gradient, of samplers of one local posterior, against its exact covariance.

    python benchmarks/accuracy_per_gradient.py

Handwritten digits (full batch, Adam), W = 30, three checkpoints at which this window is localised, n_beta = 10 n. The
reference has no step size and no burn-in: independent draws from the Gaussian of the posterior's quadratic form, in
pairs u and -u, weighted by the ratio of the two laws, and to first order exact. Hamiltonian Monte Carlo with a
Metropolis test, which shares the loss alone with it, is held against it: the root mean square of their difference in
standard errors is 1 where both are right.

A number is the root mean square error over all pairs of classes, in units of the root mean square of the reference, and
over groups of as many chains as the budget pays for. A gradient is that of the mean loss of all 1,200 samples; those of
minibatches count as the share of samples they are of, a product with the Hessian as two. Losses along the draws are not
counted.

devinterp      RMSprop-SGLD as devinterp 2.0.1 has it, by this package's own sampler: V starts at 0 and adapts
               throughout, in the coordinates of the weights, no burn-in, minibatches of 512 for each chain and no
               control variate; 100 draws a chain; nan where they diverge, and the rate that does best is run to the
               end. The posterior, unlike there, is the one that all rows sample
SGLD           step size from the curvature, full batch; a fifth of the chain is burn-in, as the five relaxation times
               that it asks for are longer than the chain
underdamped    the defaults
first order    the same with `Chains(linear=True)` and `bif(first_order=)` of the solve,
               `damped_influence(curvature="hessian")`, whose price for all classes of queries stands beside it
solve alone    without any draws: how far it is off is what there is to be sampled

Below: draws of `sampler="window"`, whose law is another, alone and with first order: standard errors at equal draws.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import xarray as xr
from hmc import Potential, hmc
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import vmap

import stagewise as sw
from stagewise.derivatives import Product, dense, hessian_product
from stagewise.influence import damped
from stagewise.influence.covariance import covariance_replicates, mean_and_stderr
from stagewise.sampling import sample_block
from stagewise.sampling.base import Gradient
from stagewise.sampling.curvature import extreme_curvature
from stagewise.sampling.gradient import potential_gradient
from stagewise.sampling.posterior import LocalDensity
from stagewise.sampling.rmsprop_sgld import RMSpropSGLD
from stagewise.studies.digits import training as digit_run
from stagewise.traces.columns import Array

console = Console(width=120)
STEPS, WINDOW = (200, 400, 700), 30
POSTERIOR = sw.LocalPosterior(window=WINDOW, n_beta=10.0 * digit_run.TRAINING_SAMPLES)
BUDGETS = (1000, 4000, 16000)
CHAIN, SLOW_CHAIN = 1000, 4000  # gradients of one chain; of overdamped chains, which are better long
RATES, BATCH, DEVINTERP_DRAWS = (1e-3, 1e-4, 1e-5), 512, 100
PAIRS, PARTS, AT_ONCE = 4096, 16, 128  # of the reference


class Problem(NamedTuple):
    """The run, and the classes whose mean losses are looked at: one row per class ``(class, sample)``."""

    task: sw.Task
    run: sw.Trajectory
    train: Tensor
    query: Tensor

    @property
    def labels(self) -> dict[str, object]:
        return {"train": self.task.train_groups, "queries": {"held-out": self.task.label_sets["queries/held-out"]}}

    def classes(self, density: LocalDensity, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of every class at ``u (place, parameters)``: ``(place, class)`` of both sets, float64."""
        batches = self.task.train.batch(slice(None)), self.task.queries["held-out"].batch(slice(None))

        def losses(row: Tensor) -> tuple[Tensor, ...]:
            params = density.params(row)
            return tuple(self.task.losses(params, batch) for batch in batches)

        with torch.no_grad():
            train, query = vmap(losses)(u)
        return train.double() @ self.train.T, query.double() @ self.query.T


def problem(folder: Path) -> Problem:
    task = digit_run.task()
    digit_run.record(folder / "run", 0, STEPS)

    def means(labels: object) -> Tensor:
        names = np.array(labels).astype(str)
        rows = np.stack([names == name for name in sorted(set(names))])
        return torch.from_numpy(rows / rows.sum(1, keepdims=True))

    labels = task.train_groups, task.label_sets["queries/held-out"]
    return Problem(task, sw.Trajectory.from_directory(folder / "run"), *map(means, labels))


# The reference


class Reference(NamedTuple):
    """Influence ``(train, query)`` and its standard error."""

    value: Array
    stderr: Array


def reference(own: Problem, density: LocalDensity) -> Reference:
    """By weighted draws of the Gaussian, in parts whose spread is the error."""
    matrix = dense(hessian_product(density, density.origin), density.origin).double()
    curvatures, directions = torch.linalg.eigh(matrix)
    spread = (density.n_beta * curvatures + density.gamma) ** -0.5
    slopes = class_gradients(own, density)
    first, second = ((slope.double() @ directions) * spread for slope in slopes)
    random, potential = torch.Generator().manual_seed(1), Potential(density)
    parts = []
    for _ in range(PARTS):
        moments = [
            weighted(own, density, potential, curvatures, directions, spread, slopes, random)
            for _ in range(PAIRS // PARTS // AT_ONCE)
        ]
        parts.append([torch.cat(kind) for kind in zip(*moments, strict=True)])
    estimates = [remainder(*part) for part in parts]
    value, stderr = mean_and_stderr(-density.kappa * np.stack(estimates))
    return Reference(value - density.kappa * (first @ second.T).numpy(), stderr)


def class_gradients(own: Problem, density: LocalDensity) -> tuple[Tensor, Tensor]:
    """Of the mean loss of every class ``(class, parameters)``, of both sets."""
    u = density.origin.clone().requires_grad_()
    params = density.params(u)
    found = []
    for data, rows in ((own.task.train, own.train), (own.task.queries["held-out"], own.query)):
        means = rows.float() @ own.task.losses(params, data.batch(slice(None)))
        found.append(torch.stack([torch.autograd.grad(mean, u, retain_graph=True)[0] for mean in means]))
    return found[0], found[1]


def weighted(
    own: Problem,
    density: LocalDensity,
    potential: Potential,
    curvatures: Tensor,
    directions: Tensor,
    spread: Tensor,
    slopes: tuple[Tensor, Tensor],
    random: torch.Generator,
) -> tuple[Tensor, ...]:
    """Losses at u and -u, logarithms of their weights, and first-order changes at u, of some draws."""
    xi = torch.randn(AT_ONCE, len(spread), generator=random, dtype=torch.float64) * spread
    u = (xi @ directions.T).to(density.anchor)
    losses, logs = [], []
    for sign in (1, -1):
        losses.append(own.classes(density, sign * u))
        with torch.no_grad():
            change = vmap(potential.loss)(sign * u).double() - potential.loss(density.origin).double()
        logs.append(density.n_beta * ((xi**2 * curvatures).sum(1) / 2 - change))
    (train, query), (mirrored_train, mirrored_query) = losses
    linear = [u.double() @ slope.double().T for slope in slopes]
    return train, query, mirrored_train, mirrored_query, *logs, *linear


def remainder(*drawn: Tensor) -> Array:
    """Weighted covariance of losses less the plain one of their first order ``(train, query)``."""
    train, query, mirrored_train, mirrored_query, log, mirrored_log, t, s = drawn
    weights = torch.softmax(torch.cat([log, mirrored_log]), 0)[:, None]
    train, query = torch.cat([train, mirrored_train]), torch.cat([query, mirrored_query])
    train, query = (losses - (weights * losses).sum(0) for losses in (train, query))
    found: Array = ((weights * train).T @ query - t.T @ s / len(t)).numpy()
    return found


# The samplers


ByBudget = dict[int, list[Array]]
"""Influence by several groups of chains, for every budget of a group."""

Estimates = Callable[[Problem, LocalDensity], ByBudget]
"""A sampler at one checkpoint."""


def grouped(chains: int, cost: int, estimate: Callable[[slice], Array]) -> ByBudget:
    """Of all disjoint groups of chains that a budget pays for."""
    sizes = {budget: budget // cost for budget in BUDGETS if cost <= budget <= cost * chains}
    return {
        budget: [estimate(slice(start, start + size)) for start in range(0, chains, size)]
        for budget, size in sizes.items()
    }


def devinterp(rate: float, chains: int, own: Problem, density: LocalDensity) -> ByBudget:
    plain = potential_gradient(density, chains, BATCH, False, "stacked", torch.Generator().manual_seed(0))
    scale = density.scale
    back = torch.where(scale > 0, 1 / scale, 0.0)

    def gradient(w: Tensor) -> Gradient:
        of_u = plain(w * back)
        return Gradient(of_u.potential * back, of_u.loss * back)

    sampler, noise = RMSpropSGLD(rate), torch.Generator().manual_seed(0)
    state, drawn = sampler.init(torch.zeros(chains, len(scale)), noise), []
    steps = CHAIN * len(own.task.train) // BATCH
    for step in range(1, steps + 1):
        state = sampler.step(state, gradient, noise)
        if not torch.isfinite(state.position).all():
            return {budget: [np.full((len(own.train), len(own.query)), np.nan)] for budget in BUDGETS}
        if step % (steps // DEVINTERP_DRAWS) == 0:
            drawn.append(own.classes(density, state.position * back))
    train, query = (torch.stack(losses, 1).numpy() for losses in zip(*drawn, strict=True))

    def estimate(group: slice) -> Array:
        found: Array = -density.kappa * covariance_replicates(train[group], query[group]).mean(0)
        return found

    return grouped(chains, CHAIN, estimate)


def chains_of(sampling: sw.Chains, cost: int, price: int, own: Problem, density: LocalDensity) -> ByBudget:
    """Of chains that cost so many gradients each, at so many gradients a step."""
    step, chains = density.checkpoint.step, BUDGETS[-1] // cost
    few = sw.Chains(sampling.sampler, chains=1, draws=1, burn_in=sampling.burn_in, thinning=sampling.thinning)
    facts = sample_block(own.task, own.run.load(step), POSTERIOR, few).attrs
    draws = (cost // price - facts["burn_in"]) // facts["thinning"]
    settings = {"chains": chains, "draws": draws, "reflect": False, "burn_in": sampling.burn_in}
    more = {"thinning": sampling.thinning, "linear": sampling.linear}
    tree = sample_block(own.task, own.run.load(step), POSTERIOR, sw.Chains(sampling.sampler, **settings, **more))
    known = {"first_order": solved(own, step).influence} if sampling.linear else {}

    def estimate(group: slice) -> Array:
        nodes = {node.path: node.to_dataset().isel(chain=group, missing_dims="ignore") for node in tree.subtree}
        part = xr.DataTree.from_dict(nodes)
        part.attrs = tree.attrs
        found = sw.bif(sw.TracesInMemory({step: part}, own.labels), trusted_only=False, **known)
        return by_class(found)

    return grouped(chains, cost, estimate)


def by_class(found: xr.Dataset) -> Array:
    """The value at its only step, classes in order."""
    order = {"train": sorted(found["train"].values), "query": sorted(found["query"].values)}
    value: Array = found["value"][0].sel(order).transpose("train", "query").values
    return value


class Solved(NamedTuple):
    """First order at one checkpoint, and how many gradients its products with the Hessian cost."""

    influence: xr.Dataset
    gradients: int


def solved(own: Problem, step: int) -> Solved:
    products = 0

    def counted(*place: Any) -> Product:
        product = hessian_product(*place)

        def counting(vectors: Tensor) -> Tensor:
            nonlocal products
            products += len(vectors)
            return product(vectors)

        return counting

    with mock.patch.object(damped, "hessian_product", counted):
        found = sw.damped_influence(own.task, own.run, POSTERIOR, curvature="hessian", steps=[step])
    return Solved(found, 2 * products)


SGLD = sw.Chains("sgld", burn_in=SLOW_CHAIN // 5, thinning=SLOW_CHAIN // 100)
ROWS = {f"devinterp, {rate:g}": partial(devinterp, rate, 1) for rate in RATES} | {
    "SGLD": partial(chains_of, SGLD, SLOW_CHAIN, 1),
    "underdamped": partial(chains_of, sw.Chains(), CHAIN, 1),
    "underdamped, first order": partial(chains_of, sw.Chains(linear=True), CHAIN, 3),
}


def errors(row: Estimates, own: Problem, density: LocalDensity, exact: Reference) -> dict[int, float]:
    """By budget, relative to the reference."""
    size = np.sqrt((exact.value**2).mean())
    return {
        budget: float(np.sqrt(np.mean([(found - exact.value) ** 2 for found in estimates])) / size)
        for budget, estimates in row(own, density).items()
    }


def compared(own: Problem, step: int) -> Table:
    """All samplers at one checkpoint."""
    density = POSTERIOR.at(own.task, own.run.load(step))
    exact = reference(own, density)
    size = np.sqrt((exact.value**2).mean())
    table = Table("error of", *(f"{budget:,} gradients" for budget in BUDGETS))
    table.title = f"step {step}, W = {WINDOW}; error of the reference {np.sqrt((exact.stderr**2).mean()) / size:.1%}\n"
    table.title += judged(own, density, exact)
    found = {name: errors(row, own, density, exact) for name, row in ROWS.items()}
    best = min(RATES, key=lambda rate: np.nan_to_num(found[f"devinterp, {rate:g}"][BUDGETS[0]], nan=np.inf))
    long = partial(devinterp, best, BUDGETS[-1] // CHAIN)
    found[f"devinterp, {best:g}"] = errors(long, own, density, exact)
    known = solved(own, step)
    apart = float(np.sqrt(((by_class(known.influence) - exact.value) ** 2).mean()) / size)
    found["solve alone"] = dict.fromkeys(BUDGETS, apart)
    for name, by_budget in found.items():
        price = f" (solve: {known.gradients:,})" if name in ("solve alone", "underdamped, first order") else ""
        table.add_row(name + price, *(f"{by_budget[b]:.2g}" if b in by_budget else "-" for b in BUDGETS))
    return table


def judged(own: Problem, density: LocalDensity, exact: Reference) -> str:
    """How far the reference is from Hamiltonian Monte Carlo."""
    slow, fast = extreme_curvature(density).precision_range(density)
    judge = hmc(density, slow, fast, 16, 20, torch.Generator().manual_seed(0))
    seen = [own.classes(density, draw) for draw in judge.positions.unbind(1)]
    traces = (torch.stack(losses, 1).numpy() for losses in zip(*seen, strict=True))
    other, error = mean_and_stderr(-density.kappa * covariance_replicates(*traces))
    apart = np.sqrt((((other - exact.value) ** 2) / (error**2 + exact.stderr**2)).mean())
    return f"HMC ({judge.gradients:,} gradients, {judge.accepted:.0%} accepted) differs from it by {apart:.2f} errors"


def window(own: Problem) -> Table:
    """Standard errors of the window's own draws."""
    columns = ("step", "influence", "beyond first order", "error of draws alone", "with first order", "times less")
    table = Table(*columns)
    table.title = f"512 draws of sampler='window' and their reflections, W = {WINDOW}: root mean squares, nats"
    for step in STEPS:
        sampling = sw.Chains("window", chains=16, draws=32, linear=True)
        tree = sample_block(own.task, own.run.load(step), POSTERIOR, sampling)
        known = sw.response_influence(own.task, own.run, POSTERIOR, at="checkpoint", steps=[step])
        traces = sw.TracesInMemory({step: tree}, own.labels)
        alone, both = (sw.bif(traces, trusted_only=False, **more) for more in ({}, {"first_order": known}))
        values = (both["value"], both["value"] - known["value"], alone["stderr"], both["stderr"])
        *sizes, before, after = (float(np.sqrt((value**2).mean())) for value in values)
        table.add_row(str(step), *(f"{size:.2e}" for size in (*sizes, before, after)), f"{before / after:.1f}")
    return table


def main() -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        own = problem(Path(folder))
        for step in STEPS:
            console.print(compared(own, step))
        console.print(window(own))
    console.print(f"{time.process_time() - start:.0f} seconds of processor time")


if __name__ == "__main__":
    main()
