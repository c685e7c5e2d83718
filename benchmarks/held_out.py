"""Predicted against measured window effects on problems that no default of stagewise was chosen on.

    python benchmarks/held_out.py [--solved] [--detail] [--only TEXT] [--seed 0]

Wine and breast cancer (classification) and diabetes (regression) from scikit-learn, a small network for each, five
optimisers: 15 runs. In each run groups of training data get 80 % of their weight during a window of 20 steps from 8
checkpoints, and the measured change of the held-out loss of every group is compared with what the sampled and the
damped influence function and the response of the window predict. `--solved` leaves out the chains, which take most of
the time. Wine and diabetes are trained with full batches, cancer with minibatches of 32. Nothing is tuned: apart from
the window and the seeds, every setting of stagewise is its default.

r and slope (measured / predicted) are over pairs of different groups. Coverage is the share of all pairs whose measured
effect lies in the stated 95 % interval. `said` numbers the sentences below the table in which stagewise itself says
that sizes may be off.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import stagewise as sw
from stagewise.reporting.findings import findings
from stagewise.reporting.words import score
from stagewise.results import Results, headline
from stagewise.run.analysis import mean_losses

console = Console(width=190)
WINDOW, WEIGHT, REPEATS = 20, 0.8, 4  # of retraining; repeats matter to minibatches only
STEPS = sw.log_spaced(600, 8, first=5)
LAST = STEPS[-1] + WINDOW  # a checkpoint after the last window, so that its learning rates are known
Array = np.ndarray[Any, np.dtype[Any]]
COLUMNS = ("run", "answered", "r", "slope", "coverage", "damped: r", "slope", "where unanswered: r", "slope", "said")
SAMPLED, DAMPED = "BIF", "damped influence"
Estimator = Callable[..., xr.Dataset]
SOLVED: dict[str, Estimator] = {
    DAMPED: sw.damped_influence,
    "response": sw.response_influence,
    "at checkpoint": partial(sw.response_influence, at="checkpoint"),
    "Gauss-Newton": partial(sw.response_influence, curvature="gauss_newton"),
}


@dataclass(frozen=True)
class Problem:
    """Data in named groups, and how a network is trained on them; batch size 0 is the whole training set."""

    features: Array
    target: Array
    groups: list[str]
    network: Callable[[], nn.Module]
    loss: Callable[[Any, tuple[Tensor, Tensor]], Tensor]
    batch_size: int


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def squared_error(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    predicted: Tensor = model(batch[0])[:, 0]
    return (predicted - batch[1]).square()


def wine() -> Problem:
    """Three cultivars, which are the groups; one hidden layer."""
    data = load_wine()
    groups = [str(name) for name in data.target_names[data.target]]
    return Problem(
        data.data,
        data.target,
        groups,
        lambda: nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3)),
        cross_entropy,
        batch_size=0,
    )


def cancer() -> Problem:
    """Two classes, each in thirds by a feature that is spread over both of them; one hidden layer, minibatches."""
    data = load_breast_cancer()
    symmetry = data.data[:, list(data.feature_names).index("mean symmetry")]
    groups = [f"{data.target_names[c]}, {third}" for c, third in zip(data.target, thirds(symmetry), strict=True)]
    return Problem(
        data.data,
        data.target,
        groups,
        lambda: nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2)),
        cross_entropy,
        batch_size=32,
    )


def diabetes() -> Problem:
    """How far the disease goes, in thirds, for either sex; two hidden layers."""
    data = load_diabetes()
    sexes = np.where(data.data[:, data.feature_names.index("sex")] > 0, "sex 2", "sex 1")
    groups = [f"{third}, {sex}" for third, sex in zip(thirds(data.target), sexes, strict=True)]
    return Problem(
        data.data,
        (data.target - data.target.mean()) / data.target.std(),
        groups,
        lambda: nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)),
        squared_error,
        batch_size=0,
    )


def thirds(values: Array) -> list[str]:
    """The third of all values that each lies in."""
    return [("low", "middle", "high")[k] for k in np.digitize(values, np.quantile(values, [1 / 3, 2 / 3]))]


PROBLEMS = {"wine": wine, "cancer": cancer, "diabetes": diabetes}
OPTIMISERS: dict[str, Callable[[Sequence[nn.Parameter]], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.05),
    "momentum .9": lambda parameters: SGD(parameters, lr=0.005, momentum=0.9),
    "Adam": lambda parameters: Adam(parameters, lr=2e-3),
    "AdamW, decay .1": lambda parameters: AdamW(parameters, lr=2e-3, weight_decay=0.1),
    "Adam, cosine": lambda parameters: Adam(parameters, lr=2e-3),
}


def task(problem: Problem, seed: int) -> sw.Task:
    """Two thirds of the data to train on, one third held out, both in the same groups; standardised features."""
    spread = (problem.features - problem.features.mean(0)) / problem.features.std(0)
    kind = torch.float32 if problem.target.dtype.kind == "f" else torch.int64
    data = torch.tensor(spread, dtype=torch.float32), torch.tensor(problem.target, dtype=kind)
    rows = np.arange(len(spread))
    train, held_out = train_test_split(rows, test_size=1 / 3, random_state=seed, stratify=problem.groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = problem.network().eval()
    return sw.Task(
        model,
        problem.loss,
        train=tuple(column[train] for column in data),
        queries={"held-out": tuple(column[held_out] for column in data)},
        train_groups=[problem.groups[row] for row in train],
        query_groups={"held-out": [problem.groups[row] for row in held_out]},
    )


def record(own: sw.Task, optimiser: str, order: sw.BatchOrder, folder: Path) -> None:
    """Train as anybody would, with the recorder in the loop."""
    model = copy.deepcopy(own.model)  # the task keeps its initial weights
    optimizer = OPTIMISERS[optimiser](list(model.parameters()))
    schedule = CosineAnnealingLR(optimizer, LAST) if "cosine" in optimiser else None
    recorder = sw.Recorder(folder, model, optimizer, (*STEPS, LAST), batch_size=order.batch_size)
    for step in range(LAST):
        optimizer.zero_grad()
        own.loss(model, own.train.batch(order(step))).mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        recorder(step + 1)


@dataclass(frozen=True)
class Study:
    """One run, what it measured, and what was predicted without sampling."""

    name: str
    task: sw.Task
    run: sw.Trajectory
    measured: xr.Dataset
    solved: dict[str, xr.Dataset]


def study(name: str, seed: int, folder: Path) -> Study:
    """Train, solve and retrain one run."""
    kind, optimiser = name.split(", ", 1)
    problem = PROBLEMS[kind]()
    own = task(problem, seed)
    order = sw.BatchOrder(len(own.train), problem.batch_size, seed)
    record(own, optimiser, order, folder)
    run, posterior = sw.Trajectory.from_directory(folder), sw.LocalPosterior(window=WINDOW)
    measured = sw.window_ablation(
        own, run, window=WINDOW, weight=WEIGHT, steps=STEPS, repeats=REPEATS, seed=seed, order=order
    )
    solved = {label: estimate(own, run, posterior, steps=STEPS) for label, estimate in SOLVED.items()}
    return Study(name, own, run, measured, solved)


def sample(study: Study, seed: int, folder: Path) -> Results:
    """The chains of one run."""
    posterior = sw.LocalPosterior(window=WINDOW)
    store = sw.sample(study.task, study.run, posterior, out=folder, steps=STEPS, seed=seed)
    return Results(
        title=study.name,
        losses=mean_losses(study.task, study.run, STEPS),
        diagnostics=sw.diagnose_run(store).merge(curvature(store)),
        influence=answered(store),
        baselines={DAMPED: study.solved[DAMPED]},
        measured=study.measured,
    )


def answered(store: sw.TraceStore) -> xr.Dataset | None:
    """The sampled influence where its chains can be trusted."""
    try:
        return sw.bif(store)
    except ValueError:  # nowhere, and the diagnostics say why
        return None


def curvature(store: sw.TraceStore) -> xr.Dataset:
    """How near the localisation is to being too weak: not localised at -1."""
    facts = [store.attrs(step) for step in store.steps]
    ratio = [fact["curvature_min"] / fact["damping"] if "damping" in fact else np.nan for fact in facts]
    return xr.Dataset({"ratio": ("step", ratio)}, {"step": list(store.steps)})


def scores(results: Results, estimator: str, name: str, unanswered: bool = False) -> xr.DataArray:
    """Correlation or slope at the checkpoints of an estimator, or at those which sampling does not answer."""
    if estimator not in results.agreements:
        return xr.DataArray(np.zeros(0), {"step": np.zeros(0, int)}, ("step",))
    agreement = results.agreements[estimator]
    values = agreement[headline(agreement, name)]
    return values.sel(step=[s for s in values["step"].values if s in results.omitted]) if unanswered else values


def spread(values: xr.DataArray) -> str:
    """Median [least, largest] over checkpoints."""
    if not values.size:
        return "-"
    middle, least, largest = (score(float(v)) for v in (values.median(), values.min(), values.max()))
    return f"{middle} [{least}, {largest}]"


def solved_row(study: Study) -> list[str]:
    """A row of the table of what needs no sampling."""
    cells = []
    for influence in study.solved.values():
        predicted = sw.predicted_effect(influence, WEIGHT)["effect"]
        agreement = sw.agreement(predicted, study.measured["effect"].sel(step=predicted["step"]))
        cells += [spread(agreement[headline(agreement, name)]) for name in ("correlation", "slope")]
        if predicted.sizes["step"] < len(STEPS):
            cells[-2] += f" at {predicted.sizes['step']}"
    return [study.name, *cells]


def doubts(results: Results) -> list[str]:
    """What stagewise itself says about sizes that may be off."""
    return [sentence for sentence in findings(results) if "sizes" in sentence]


def summary_row(results: Results, notes: list[str]) -> list[str]:
    """A row of the table of all runs; what stagewise says of sizes goes to ``notes``."""
    covered, said = results.coverage, []
    for sentence in doubts(results):
        notes.append(sentence)
        said.append(str(len(notes)))
    cells = [
        spread(scores(results, estimator, name, unanswered))
        for estimator, unanswered in ((SAMPLED, False), (DAMPED, False), (DAMPED, True))
        for name in ("correlation", "slope")
    ]
    share = "-" if covered is None else f"{float(covered.mean()):.0%}"
    known = f"{len(STEPS) - len(results.omitted)} of {len(STEPS)}"
    return [known, *cells[:2], share, *cells[2:], ", ".join(said)]


def detail_rows(results: Results) -> Iterator[list[str]]:
    """A row for every checkpoint."""
    covered = results.coverage
    columns = [scores(results, e, name) for e in (SAMPLED, DAMPED) for name in ("correlation", "slope")]
    for step in results.diagnostics["step"].values:
        one = results.diagnostics.sel(step=step)
        r, slope, *damped = (score(float(c.sel(step=step))) if step in c["step"].values else "-" for c in columns)
        share = f"{float(covered.sel(step=step)):.0%}" if covered is not None and step in covered["step"] else "-"
        facts = [f"{float(results.losses['train'].sel(step=step)):.3g}", f"{float(one['ratio']):.2f}"]
        yield [str(step), *facts, str(one["verdict"].item()), r, slope, share, *damped]


def show_detail(name: str, results: Results) -> None:
    """The checkpoints of a run, and what stagewise advises at them."""
    columns = ("step", "loss", "ratio", "verdict", "r", "slope", "coverage", "damped: r", "slope")
    table = Table(*columns, title=f"{name}; ratio: most negative curvature / damping")
    for row in detail_rows(results):
        table.add_row(*map(escape, row))
    console.print(table)
    for step, advice in zip(results.diagnostics["step"].values, results.diagnostics["advice"].values, strict=True):
        if advice:
            console.print(f"step {step}: {advice}", markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured window effects on three small problems.")
    parser.add_argument("--detail", action="store_true", help="a table of checkpoints for every run")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name holds TEXT, e.g. 'wine, Adam'")
    parser.add_argument("--seed", type=int, default=0, help="of split, initial weights, batches and chains")
    parser.add_argument("--solved", action="store_true", help="only what needs no sampling")
    options = parser.parse_args()
    start = time.perf_counter()
    notes: list[str] = []
    title = escape(f"W = {WINDOW}, weight {WEIGHT}: median over checkpoints [least, largest]")
    table = Table(*COLUMNS, title=title)
    solved = Table("run", *(part for label in SOLVED for part in (f"{label}: r", "slope")), title=title)
    for name in (f"{problem}, {optimiser}" for problem in PROBLEMS for optimiser in OPTIMISERS):
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            one = study(name, options.seed, Path(folder) / "checkpoints")
            solved.add_row(*map(escape, solved_row(one)))
            if options.solved:
                continue
            results = sample(one, options.seed, Path(folder) / "traces")
        table.add_row(name, *map(escape, summary_row(results, notes)))
        if options.detail:
            show_detail(name, results)
    if not options.solved:
        console.print(table)
    console.print(solved)
    for number, sentence in enumerate(notes, start=1):
        console.print(f"{number}. {sentence}", markup=False, highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
