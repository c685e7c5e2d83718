"""Independent draws from the window's own Gaussian beside chains, both against the exact influence of the window.

    python benchmarks/window_gaussian.py [--draws 64] [--only TEXT]

Classes of handwritten digits (full batch, Adam) and groups of diabetes patients (full batch, momentum .9), a few
checkpoints each. Every estimator is held against `window_influence` over pairs of different groups: r, the slope of the
exact influence on the estimate (which the noise of an estimate lowers), and the size, the slope of the estimate on the
exact influence (which noise leaves as it is; 1 is right). `odd` is the odd part under reflection about the checkpoint.
The response is that at the checkpoint, the quantity that the draws estimate. Work counts gradients of the mean loss for
chains and products with its curvature for draws and response, each of which costs more than a gradient; seconds are
of processor time on one thread, losses along the draws included. Apart from windows and the number of draws every
setting is its default.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import held_out
import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stagewise as sw
from stagewise.derivatives import Product, hessian_product
from stagewise.groups import same_label
from stagewise.sampling import sample_block, window_gaussian
from stagewise.studies.digits import training as digit_run
from stagewise.traces.columns import Part
from stagewise.traces.diagnostics import diagnose

console = Console(width=150)
CHAINS = 16
PARTS: tuple[Part, ...] = ("full", "odd")
COLUMNS = ("step", "estimator", "r", "slope", "size", "intervals hold", "work", "seconds", "verdict")


@dataclass(frozen=True)
class Run:
    """A recorded run, and the windows and checkpoints to look at."""

    task: sw.Task
    order: sw.BatchOrder
    record: Callable[[Path], None]
    windows: Sequence[int]
    steps: Sequence[int]


def digits() -> Run:
    steps = (8, 20, 76, 700)
    return Run(digit_run.task(), digit_run.batch_order(0), partial(_record_digits, steps), (10, 30), steps)


def _record_digits(steps: Sequence[int], folder: Path) -> None:
    digit_run.record(folder / "run", 0, steps)


def diabetes() -> Run:
    own = held_out.task(held_out.diabetes(), 0)
    order = sw.BatchOrder(len(own.train), 0, 0)
    record = partial(_record_held_out, own, order)
    return Run(own, order, record, (held_out.WINDOW,), held_out.STEPS[::2])


def _record_held_out(own: sw.Task, order: sw.BatchOrder, folder: Path) -> None:
    held_out.record(own, "momentum .9", order, folder / "run")


RUNS = {"digits, Adam": digits, "diabetes, momentum .9": diabetes}


class Counted:
    """Products with the curvature, counted."""

    def __init__(self) -> None:
        self.products = 0

    def __call__(self, *place: object) -> Product:
        product: Product = hessian_product(*place)  # type: ignore[arg-type]

        def counting(vectors: Tensor) -> Tensor:
            self.products += len(vectors)
            return product(vectors)

        return counting


def table(name: str, run: Run, window: int, draws: int) -> Table:
    """All checkpoints of a run at one window."""
    result = Table(*COLUMNS, title=f"{name}, W = {window}, {CHAINS} x {draws} draws and their reflections")
    with tempfile.TemporaryDirectory() as folder:
        run.record(Path(folder))
        trajectory = sw.Trajectory.from_directory(Path(folder) / "run")
        steps = list(run.steps)
        exact = sw.window_influence(run.task, trajectory, window=window, steps=steps, order=run.order)
        for step in steps:
            for row in rows(run.task, trajectory, exact.sel(step=[step]), window, draws):
                result.add_row(str(step), *row)
            result.add_section()
    return result


def rows(task: sw.Task, run: sw.Trajectory, exact: xr.Dataset, window: int, draws: int) -> Iterator[list[str]]:
    """Every estimator at one checkpoint."""
    step, posterior = int(exact["step"][0]), sw.LocalPosterior(window=window)
    start = time.process_time()
    response = sw.response_influence(task, run, posterior, steps=[step], at="checkpoint")
    costs = [f"{window * response.sizes['query']:,}", f"{time.process_time() - start:.1f}"]
    yield ["response", *scores(response, exact, response), *costs, ""]
    for label, sampling in (("draws", sw.Chains("window", CHAINS)), ("chains", sw.Chains("underdamped", CHAINS))):
        counted, start = Counted(), time.process_time()
        with mock.patch.object(window_gaussian, "hessian_product", counted):
            tree = sample_block(task, run.load(step), posterior, replace(sampling, draws=draws))
        seconds, facts, verdict = time.process_time() - start, tree.attrs, str(diagnose(tree)["verdict"].item())
        if "train" not in tree:
            yield [label, *["-"] * 5, f"{seconds:.1f}", verdict]
            continue
        work = counted.products or CHAINS * (facts["burn_in"] + draws * facts["thinning"])
        for part in PARTS:
            found = estimate(task, step, tree, part)
            yield [f"{label}, {part}", *scores(found, exact, response), f"{work:,}", f"{seconds:.1f}", verdict]


def estimate(task: sw.Task, step: int, tree: xr.DataTree, part: Part) -> xr.Dataset:
    """Influence from the draws at one checkpoint."""
    queries = {name: task.label_sets[f"queries/{name}"] for name in task.queries}
    labels = {"train": task.train_groups, "queries": queries}
    return sw.bif(sw.TracesInMemory({step: tree}, labels), part=part, trusted_only=False)


def scores(found: xr.Dataset, exact: xr.Dataset, response: xr.Dataset) -> list[str]:
    """r, slope and size against the exact influence, and how often intervals hold the response."""
    other = ~same_label(exact["train"].values, exact["query"].values, exact.coords.get("train_size"))
    like = {name: exact[name] for name in ("train", "query")}
    value, error, target = (
        data.sel(like).transpose("step", "train", "query").values[0][other]
        for data in (found["value"], found["stderr"], response["value"])
    )
    true = exact["value"].transpose("step", "train", "query").values[0][other]
    held = f"{np.mean(abs(value - target) < 1.96 * error):.0%}" if error.any() else ""
    return [
        f"{np.corrcoef(value, true)[0, 1]:.2f}",
        f"{value @ true / (value @ value):.2f}",
        f"{value @ true / (true @ true):.2f}",
        held,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Independent draws and chains against exact influence.")
    parser.add_argument("--draws", type=int, default=64, help="of each of 16 chains")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name holds TEXT, e.g. 'digits'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    for name, make in RUNS.items():
        if options.only in name:
            run = make()
            for window in run.windows:
                console.print(table(name, run, window, options.draws))
    console.print(f"{time.process_time() - start:.0f} seconds of processor time")


if __name__ == "__main__":
    main()
