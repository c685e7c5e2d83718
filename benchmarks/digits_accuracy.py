"""Predicted against measured window effects on the digits study: the table behind the claims in the README.

    python benchmarks/digits_accuracy.py [FOLDER]

Runs `stagewise study digits` into FOLDER (default runs/digits; what is there is not computed again) and compares, at
every checkpoint, the effect of giving each class 80 % of its weight during a window of W steps, as measured by
retraining, with the sampled Bayesian influence function, gradient products in Adam's and the Euclidean metric, and the
exact damped influence function. The localisation test (smallest whitened eigenvalue against the damping) is computed
without the measurements; its verdict stands beside the slopes it should explain.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.results import Results
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.run.config import RunConfig
from stagewise.run.pipeline import run
from stagewise.run.progress import progress_bars
from stagewise.sampling.curvature import extreme_curvature
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.digits.study import study
from stagewise.studies.digits.training import batch_order, task

console = Console(width=150)
LONG_WINDOW = 100


def scores(influence: xr.Dataset, measured: xr.Dataset, step: int) -> tuple[str, str, str]:
    """Off-diagonal correlation, correlation over all pairs, slope off-diagonal/all: as words for the table."""
    if step not in influence["step"].values:
        return "-", "-", "-"
    predicted = predicted_effect(influence.sel(step=[step]), measured.attrs["weight"])
    result = agreement(predicted["effect"], measured["effect"].sel(step=[step])).isel(step=0)
    return (
        f"{float(result['correlation_off_diagonal']):.2f}",
        f"{float(result['correlation']):.2f}",
        f"{float(result['slope_off_diagonal']):.2f}/{float(result['slope']):.2f}",
    )


def window_table(config: RunConfig, results: Results) -> None:
    """W = 30: every estimator at every checkpoint."""
    trajectory, own = Trajectory.from_directory(config.checkpoints), task()
    steps = results.losses["step"].values.tolist()
    posterior = config.posterior
    estimators = {
        "BIF": results.influence,
        "exact damped": damped_influence(own, trajectory, posterior, curvature="exact", steps=steps),
        "Gauss-Newton": results.baselines["damped influence"],
        "gradients, Adam": results.baselines["gradient product"],
        "gradients, plain": gradient_product(
            own, trajectory, LocalPosterior(window=posterior.window, metric="euclidean"), steps=steps
        ),
    }
    table = Table(
        "step", "loss", "ratio", title=f"{config.title}, W = {posterior.window}: r off-diagonal / all, slopes"
    )
    for name in estimators:
        table.add_column(name)
    rows = []
    for step in steps:
        density = posterior.at(own, trajectory.load(step))
        ratio = extreme_curvature(density).smallest / density.damping
        cells = {name: scores(result, results.measured, step) for name, result in estimators.items()}
        rows.append((step, ratio, cells["BIF"]))
        loss = float(results.losses["train"].sel(step=step))
        words = [f"{off} / {every}  {slope}" for off, every, slope in cells.values()]
        table.add_row(str(step), f"{loss:.3f}", f"{ratio:.2f}", *words)
    console.print(table)
    answered = [
        [float(word) for word in (off, every, *slope.split("/"))] for _, _, (off, every, slope) in rows if off != "-"
    ]
    values = np.array(answered)
    off, every, slope_off, slope = values.T
    console.print(
        f"BIF at {len(values)} checkpoints: r off-diagonal median {np.median(off):.2f}, least {off.min():.2f}; "
        f"r over all pairs median {np.median(every):.2f}, least {every.min():.2f}; "
        f"slope off-diagonal {slope_off.min():.2f} to {slope_off.max():.2f}, "
        f"over all pairs {slope.min():.2f} to {slope.max():.2f}\n"
    )


def localisation_table(config: RunConfig) -> None:
    """W = 100: what the localisation test says, and the slope of the exact damped influence function."""
    trajectory, own = Trajectory.from_directory(config.checkpoints), task()
    steps = list(trajectory.steps)[::3]
    posterior = LocalPosterior(window=LONG_WINDOW)
    predicted = damped_influence(own, trajectory, posterior, curvature="exact", steps=steps)
    optimizer = trajectory.load(steps[0]).optimizer
    order = batch_order(optimizer.batch_size)
    measured = window_ablation(own, trajectory, window=LONG_WINDOW, steps=steps, repeats=2, order=order)
    table = Table(
        "step", "ratio", "localised", "exact damped: r off / all", "slope off/all", title=f"{config.title}, W = 100"
    )
    for step in steps:
        density = posterior.at(own, trajectory.load(step))
        curvature = extreme_curvature(density)
        off, every, slope = scores(predicted, measured, step)
        verdict = "yes" if curvature.localised(density) else "no"
        table.add_row(str(step), f"{curvature.smallest / density.damping:.2f}", verdict, f"{off} / {every}", slope)
    console.print(table)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/digits")
    for config in study(folder):
        with progress_bars(console) as progress:
            results = run(config, progress)
        window_table(config, results)
        localisation_table(config)


if __name__ == "__main__":
    main()
