"""What sampling costs against its floor, the forward and backward passes that it cannot do without.

    python benchmarks/sampling_speed.py [--minibatches]

On the digits network, all as ratios within one run: a block of chains stacked into one call and looped over, against
the gradient of one model times the number of chains; the control variate; effective draws per gradient of the
samplers at their own tuning; and, if asked for, what minibatches cost and give beside full batches (long).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table
from timing import seconds

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.differentiate import differentiable, gradient
from stagewise.influence.bif import bif
from stagewise.influence.trusted import TracesInMemory
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.gradient import BatchLoss, potential_gradient
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.sampling.tuning import LANGEVIN, tune
from stagewise.studies.digits.training import record, task
from stagewise.traces.diagnostics import diagnose

CHAINS, STEP, BATCH = 32, 240, 256
console = Console(width=110)


def one_gradient(density: LocalDensity, u: torch.Tensor, batch: object) -> torch.Tensor:
    """The gradient of one model: the floor."""
    with differentiable(u) as leaf:
        return gradient(BatchLoss(density)(leaf, batch), leaf)


def gradients(density: LocalDensity) -> None:
    train = density.task.train
    origin, u = torch.zeros_like(density.anchor), 1e-3 * torch.randn(CHAINS, density.vector.size)
    table = Table(
        "gradient of a block", "seconds", "times the floor", title=f"{CHAINS} chains, {torch.get_num_threads()} threads"
    )
    for name, size in (("full batch", None), (f"minibatch of {BATCH}", BATCH)):
        batch = train.batch(slice(0, size or len(train)))
        floor = CHAINS * seconds(lambda batch=batch: one_gradient(density, origin, batch))
        table.add_row(f"{name}: floor, one model x {CHAINS}", f"{floor:.4f}", "1")
        for batching, variate in (("stacked", True), ("loop", True), ("stacked", False)):
            if size is None and not variate:
                continue
            function = potential_gradient(density, CHAINS, size, variate, batching, torch.Generator().manual_seed(0))
            spent = seconds(lambda function=function: function(u))
            kind = "" if size is None else ", control variate" if variate else ", own batches, no control variate"
            table.add_row(f"{name}: {batching}{kind}", f"{spent:.4f}", f"{spent / floor:.2f}")
    console.print(table)


def samplers(density: LocalDensity, trajectory: Trajectory) -> None:
    table = Table(
        "sampler", "steps per draw", "burn-in", "effective draws", "per 1000 gradients", title="at their own tuning"
    )
    for name in LANGEVIN:
        sampling = Chains(sampler=name, chains=16, draws=40, batching="stacked", reflect=False)
        tuning = tune(density, sampling)
        tree = sample_block(density.task, trajectory.load(STEP), density.posterior, sampling)
        effective = float(diagnose(tree)["ess_bulk"])
        spent = sampling.chains * (tuning.burn_in + sampling.draws * tuning.thinning)
        row = (str(tuning.thinning), str(tuning.burn_in), f"{effective:.0f}", f"{1000 * effective / spent:.1f}")
        table.add_row(name, *row)
    console.print(table)


# How often the chains of minibatches are run, with other noise each time.
REPEATS = {8: 2, 64: 6, 256: 6}
WHOLE_REPEATS = 6


def minibatches(density: LocalDensity, trajectory: Trajectory) -> None:
    """Sizes and 95 % intervals of group influence, against the mean of runs on full batches."""

    def sampled(size: int | None, seed: int) -> tuple[xr.Dataset, float, float]:
        sampling = Chains(chains=CHAINS, draws=64, batch_size=size, seed=seed, reflect=False)
        tree = sample_block(density.task, trajectory.load(STEP), density.posterior, sampling)
        labels = {"train_groups": density.task.train_groups, "query_groups": density.task.query_groups}
        steps = tree.attrs["burn_in"] + sampling.draws * tree.attrs["thinning"]
        used = tree.attrs["batch_size"]
        per_step = len(density.task.train) if used is None else used * (1 + 1 / CHAINS)
        return bif(TracesInMemory({STEP: tree}), **labels), steps, steps * per_step

    table = Table("batch", "steps", "sample gradients", "size", "in the 95 % intervals", title="beside full batches")
    whole = [sampled(None, seed) for seed in range(WHOLE_REPEATS)]
    _, steps, cost = whole[0]
    values = np.stack([found.value for found, _, _ in whole])
    truth, error = values.mean(0), np.sqrt(np.mean([found.stderr**2 for found, _, _ in whole], 0) / WHOLE_REPEATS)
    squared = (truth**2).sum() - (values.var(0, ddof=1) / WHOLE_REPEATS).sum()  # without that of its own noise
    for size, repeats in REPEATS.items():
        runs = [sampled(size, WHOLE_REPEATS + seed) for seed in range(repeats)]
        slopes = [float((found.value * truth).sum() / squared) for found, _, _ in runs]
        held = np.mean([abs(found.value - truth) <= 1.96 * np.hypot(found.stderr, error) for found, _, _ in runs])
        size_words = f"{np.mean(slopes):.3f} ± {np.std(slopes, ddof=1) / repeats**0.5:.3f}"
        _, here, spent = runs[0]
        table.add_row(str(size), f"x {here / steps:.1f}", f"x {spent / cost:.2f}", size_words, f"{held:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What sampling costs against its floor.")
    parser.add_argument("--minibatches", action="store_true", help="beside full batches, many times over")
    beside = parser.parse_args().minibatches
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "checkpoints", 64, [STEP])
        trajectory = Trajectory.from_directory(Path(folder) / "checkpoints")
        density = LocalPosterior(window=30).at(task(), trajectory.load(STEP))
        gradients(density)
        samplers(density, trajectory)
        if beside:
            minibatches(density, trajectory)


if __name__ == "__main__":
    main()
