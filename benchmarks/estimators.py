"""Every estimator of what training data do in a window of training, against retraining the window, and what it costs.

    python benchmarks/estimators.py [--only TEXT] [--all]

Its problems, of which --only runs those whose name holds TEXT:

digits            single handwritten digits and their classes; Adam, batches of 64, windows of 30 updates
shapes            the convolutional network of examples/own_model; SGD with momentum, windows of 8
language model    classes of tokens in a small transformer on Python's standard library; Adam, windows of 30

r and slope (measured / predicted) are those of `window_ablation` with weight .95 of every group, over pairs of
different groups; the slope only where the estimate is in nats of a window. LDS is `window_lds`: the rank correlation
over windows with a random half of the samples at weight .5 and the others at 1.5. All are medians [range] over the
checkpoints that the estimator answers. Gradients are its floating-point operations in products of matrices and
convolutions at the first of these, in units of those of the loss and gradient of one sample; seconds are medians per
checkpoint. MiB is memory: every estimator has a process of its own, which loads its problem and the libraries and makes
one gradient; counted is how far the peak of its resident set lies above that, which Linux alone tells.

Nothing is tuned: apart from windows and seeds, every setting of stagewise is its default. TRAK and EK-FAC are optional
libraries: `make .venv/.installed-baselines`. They, the response, chains, gradients and damped forms know the checkpoint
alone. Exact replay knows the window's batches too, as the measurement does, and so which samples they do not hold;
"exact, any batches" is that of weight at the rate at which samples are drawn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import others
import torch
import xarray as xr
from exact_accuracy import compared
from held_out import spread
from peak import forget_peak, peak
from problems import PROBLEMS, Problem
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import stagewise as sw

console = Console(width=170)
COUNTED = 32  # samples whose loss and gradient are the unit of work
COLUMNS = ("estimator", "answered", "r", "slope", "LDS", "gradients", "seconds", "MiB")


def sampled(problem: Problem, step: int) -> xr.Dataset:
    problem.sample(step)
    return problem.bif(step)


def from_checkpoint(estimate: Callable[..., xr.Dataset], problem: Problem, step: int) -> xr.Dataset:
    return estimate(problem.grouped, problem.folder, problem.posterior, steps=[step])


def along_checkpoints(estimate: Callable[..., xr.Dataset], problem: Problem, step: int) -> xr.Dataset:
    """The influence of the window at its end, from the checkpoints before it, in it and after it."""
    run, end = problem.run, step + problem.window
    if run.load(step).optimizer.name != "sgd":
        raise ValueError("for runs of SGD only")
    part = sw.Trajectory.from_checkpoints(run.load(other) for other in run.steps if step <= other <= end)
    found = estimate(problem.task, part, groups=range(len(problem.task.train)), during=range(step, end))
    return found.sel(step=[end]).assign_coords(step=[step])


def of_others(estimate: Callable[..., xr.Dataset], problem: Problem, step: int) -> xr.Dataset:
    return estimate(problem.task, problem.run.load(step))


@dataclass(frozen=True)
class Row:
    """An estimator, and whether it is in nats of a window."""

    estimate: Callable[[Problem, int], xr.Dataset]
    nats: bool = True


ROWS = {
    "exact replay": Row(lambda problem, step: problem.exact(step)),
    "exact, any batches": Row(lambda problem, step: problem.exact(step, expected=True)),
    "response": Row(partial(from_checkpoint, sw.response_influence)),
    "BIF": Row(sampled),
    "BIF, odd part": Row(lambda problem, step: problem.bif(step, "odd")),
    "damped, Gauss-Newton": Row(partial(from_checkpoint, sw.damped_influence)),
    "damped, Hessian": Row(partial(from_checkpoint, partial(sw.damped_influence, curvature="hessian"))),
    "gradient product": Row(partial(from_checkpoint, sw.gradient_product)),
    "cosine of gradients": Row(partial(of_others, others.cosine), nats=False),
    "TracIn": Row(partial(along_checkpoints, sw.tracin)),
    "SOURCE": Row(partial(along_checkpoints, sw.source)),
    "TRAK": Row(partial(of_others, others.trak), nats=False),
    "EK-FAC": Row(
        lambda problem, step: others.ekfac(problem.task, problem.run.load(step), problem.predict), nats=False
    ),
}
SHARED = {"BIF, odd part": "as BIF"}  # the same chains


@dataclass(frozen=True)
class Answers:
    """What an estimator says at the checkpoints that it answers, why it leaves out others, and the seconds of all.

    ``peak`` is memory in MiB, see above; NaN where it is not known.
    """

    values: dict[int, xr.Dataset]
    seconds: dict[int, float]
    omitted: dict[int, str]
    peak: float = np.nan

    @property
    def median_seconds(self) -> float:
        return float(np.median(list(self.seconds.values())))


def answers(problem: Problem, row: Row) -> Answers:
    """At every checkpoint by itself.

    Raises:
        ImportError: its library is not installed.
    """
    found = Answers({}, {}, {})
    for step in problem.steps:
        start = time.perf_counter()
        try:
            found.values[step] = row.estimate(problem, step)
        except ValueError as error:
            found.omitted[step] = str(error).split(f"step {step}: ", 1)[-1].split(";")[0]  # the reason, not the advice
        found.seconds[step] = time.perf_counter() - start
    return found


def answers_alone(problem: Problem, name: str) -> Answers:
    """In a process of its own, with its peak memory.

    Raises:
        ImportError: its library is not installed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(answers_here, problem.name, problem.folder.parent, name).result()


def answers_here(problem_name: str, folder: Path, name: str) -> Answers:
    """With the peak memory of this process, beyond what it has with a problem loaded."""
    problem = PROBLEMS[problem_name](folder)
    one_gradient(problem)
    with suppress(ImportError):
        import kronfluence  # noqa: F401
        import trak  # noqa: F401
    before = forget_peak()
    found = answers(problem, ROWS[name])
    return replace(found, peak=peak() - before)


def one_gradient(problem: Problem) -> None:
    """Of the mean loss of a few samples."""
    place = {k: v.requires_grad_(k in problem.task.trainable) for k, v in problem.task.state().items()}
    problem.task.sample_losses(place, problem.task.train.batch(slice(0, COUNTED)))[0].mean().backward()


def gradients(problem: Problem, row: Row, step: int) -> float:
    """Operations of the estimate over those of the loss and gradient of one sample."""
    return operations(lambda: row.estimate(problem, step)) / operations(lambda: one_gradient(problem)) * COUNTED


def operations(call: Callable[[], object]) -> int:
    """In products of matrices and convolutions."""
    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def convolution_backward(slope: Any, _input: Any, weight: Any, *rest: Any, **_options: Any) -> int:
    """Either gradient costs what the convolution does; torch's own count takes many models at once for one large."""
    wanted = rest[7]
    return int(sum(wanted[:2]) * 2 * np.prod(slope) * np.prod(weight[1:]))


# Tables


def cells(problem: Problem, name: str, found: Answers) -> list[str]:
    """A row of the table."""
    row, answered = ROWS[name], f"{len(found.values)} of {len(problem.steps)}"
    cost = [SHARED[name]] * 2 if name in SHARED else [f"{found.median_seconds:.3g}", f"{found.peak:,.0f}"]
    if not found.values:
        return [name, answered, "-", "-", "-", "-", *cost]
    scores = compared(xr.concat([problem.by_group(v) for v in found.values.values()], "step"), problem.measured)
    slope = spread(scores["slope"]) if row.nats else "-"
    count = SHARED.get(name) or f"{gradients(problem, row, next(iter(found.values))):,.0f}"
    return [name, answered, spread(scores["correlation"]), slope, lds(problem, found), count, *cost]


def reasons(name: str, omitted: dict[int, str]) -> list[str]:
    """Why an estimator leaves out checkpoints."""
    steps = {reason: [step for step, other in omitted.items() if other == reason] for reason in omitted.values()}
    return [f"{name}, step {', '.join(map(str, which))}: {reason}" for reason, which in steps.items()]


def lds(problem: Problem, found: Answers) -> str:
    """The score of single samples."""
    if problem.halves is None:
        return "-"
    scores = xr.concat(
        [sw.window_lds(value, problem.halves.sel(step=[step])) for step, value in found.values.items()], "step"
    )
    return spread(scores["lds"])


def break_even(problem: Problem, chains: float) -> str:
    """From how many query groups on the chains, which do not depend on their number, cost less than exact replay."""
    (one, task), (many, other) = problem.by_queries().items()
    least, most = (
        answers(problem, Row(lambda problem, step, task=task: problem.exact(step, task))).median_seconds
        for task in (task, other)
    )
    each = (most - least) / (many - one)
    words = f"exact replay: {least:.2g} s with {one} query group, {most:.2g} s with {many}; chains: {chains:.2g} s. "
    if np.isnan(chains):
        return words.split("; chains")[0]
    if chains <= least:
        return words + "Chains cost less from the first query group on."
    if each <= 0:
        return words + "Exact replay costs no more for more query groups: chains never cost less."
    return words + f"Chains cost less from about {one + (chains - least) / each:,.0f} query groups on."


def show(problem: Problem, every: bool) -> None:
    """The table of a problem, and what stands below it."""
    title = f"{problem.name}, W = {problem.window}, steps {', '.join(map(str, problem.steps))}: median [range]"
    table, notes, chains = Table(*COLUMNS, title=escape(title)), list[str](), np.nan
    for name in ROWS:
        if name in problem.long and not every:
            table.add_row(name, "with --all")
            continue
        try:
            found = answers_alone(problem, name)
        except ImportError:
            table.add_row(name, "not installed")
            continue
        table.add_row(*map(escape, cells(problem, name, found)))
        notes += reasons(name, found.omitted)
        if name == "BIF":
            chains = found.median_seconds
    console.print(table)
    for note in [*notes, break_even(problem, chains)]:
        console.print(note, markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Estimators of a window's influence against retraining, and their cost."
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help=f"problems whose name holds TEXT: {', '.join(PROBLEMS)}"
    )
    parser.add_argument("--all", action="store_true", help="also rows that take long, of the language model")
    options = parser.parse_args()
    for name, make in PROBLEMS.items():
        if options.only in name:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                show(make(Path(folder)), options.all)
            console.print(f"{name}: {time.perf_counter() - start:.0f} seconds\n")


if __name__ == "__main__":
    main()
