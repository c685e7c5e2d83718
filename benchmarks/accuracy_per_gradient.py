"""Error of class-to-class influence per gradient, of samplers of one local posterior, against its exact covariance.

    make peers      or      python benchmarks/accuracy_per_gradient.py [--peers PYTHON] [--problem NAME] [--steps N]
                                                                       [--figure FILE]

PYTHON is that of an environment with peers-requirements.txt, for `devinterp`; N are the first checkpoints alone; FILE
is drawn, with a panel for every checkpoint of the last problem. W = 30, n_beta as the package's pilot
finds it (in the titles), at three checkpoints of two runs with Adam:

digits          the full batch; pairs of classes
Markov chains   the study's attention network in 3,363 parameters, which learns induction; the posterior of 16 of its
                1,024 sequences, as in the study; pairs of kinds of tokens in each third of a sequence. Checkpoints were
                taken of those that are localised, before any error was known: none in the middle of the transition is

The reference is the better of two, see accuracy_reference.py: the root mean square of their difference in standard
errors is 1 where both are right.

A number is the root mean square error over all pairs of classes, in units of the root mean square of the reference, and
over groups of as many chains as the budget pays for. A gradient is that of the mean loss of all training samples; those
of minibatches count as the share of samples they are of, a product with the Hessian as two. Losses along the draws are
not counted.

devinterp      its RMSprop-SGLD, see accuracy_devinterp.py, or without --peers this package's sampler with its settings:
               V starts at 0 and adapts throughout, no burn-in, minibatches of 400 digits, or all 16 sequences, and no
               control variate; 100 draws a chain. Batches and learning rates are those with the least error, as nothing
               is for other rows: of the rates below by the error of one chain
SGLD           step size from the curvature, full batch; a fifth of the chain is burn-in, as the five relaxation times
               that it asks for are longer than the chain
underdamped    the defaults
first order    the same with `Chains(linear=True)` and `bif(first_order=)` of the solve,
               `damped_influence(curvature="hessian")`, whose price for all classes of queries stands beside it
draws="auto"   the defaults, until their own rule says that the error is 10 %: what they spent, and the error reached
solve alone    without any draws: how far it is off is what there is to be sampled

Below: draws of `sampler="window"`, whose law is another, alone and with first order: standard errors at equal draws.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accuracy_figure import ALONE, FIRST_ORDER, Compared, error_against_gradients
from accuracy_problems import WINDOW, Place, Problem, digits, markov
from accuracy_reference import Reference, references
from accuracy_samplers import (
    BUDGETS,
    CHAIN,
    SLOW_CHAIN,
    ByBudget,
    Drawing,
    Setting,
    by_budget,
    by_class,
    by_devinterp,
    by_its_own_rule,
    by_this_package,
    chains_of,
    solved,
)
from rich.console import Console
from rich.table import Table

import stagewise as sw
from stagewise.sampling import sample_block

console = Console(width=120)
PROBLEMS = {"digits": digits, "markov": markov}
RATES = {
    "weights": ("3e-5", "1e-5", "3e-6", "1e-6", "3e-7"),
    "whitened": ("3e-7", "1e-7", "3e-8", "1e-8", "3e-9", "1e-9"),
}
SGLD = sw.Chains("sgld", burn_in=SLOW_CHAIN // 5, thinning=SLOW_CHAIN // 100)
AUTO = 'draws="auto"'
ROWS = {
    "SGLD": partial(chains_of, SGLD, SLOW_CHAIN, 1),
    "underdamped": partial(chains_of, sw.Chains(), CHAIN, 1),
    "underdamped, first order": partial(chains_of, sw.Chains(linear=True), CHAIN, 3),
}


def errors(found: ByBudget, exact: Reference) -> dict[int, float]:
    """By budget, relative to the reference."""
    size = np.sqrt((exact.value**2).mean())
    return {
        budget: float(np.sqrt(np.mean([(one - exact.value) ** 2 for one in estimates])) / size)
        for budget, estimates in found.items()
    }


def rmsprop_sgld(drawing: Drawing, place: Place, exact: Reference) -> dict[Setting, dict[int, float]]:
    """In both coordinates, each at its best learning rate."""

    def of(settings: list[Setting]) -> dict[Setting, dict[int, float]]:
        traces = drawing(place, settings)
        return {setting: errors(by_budget(place, traces[setting]), exact) for setting in settings}

    short = of([Setting(kind, rate, 1) for kind, rates in RATES.items() for rate in rates])
    best = []
    for kind in RATES:
        found = {setting.rate: error[CHAIN] for setting, error in short.items() if setting.coordinates == kind}
        rate = min(found, key=lambda rate: np.nan_to_num(found[rate], nan=np.inf))
        best.append(Setting(kind, rate, BUDGETS[-1] // CHAIN))
    return of(best)


def compared(place: Place, drawing: Drawing, name: str) -> Compared:
    """All samplers at one checkpoint."""
    (exact, judged), known = references(place), solved(place)
    theirs = rmsprop_sgld(drawing, place, exact)
    remarks = {f"{name}, {setting.coordinates}": f" at {setting.rate}" for setting in theirs}
    found = dict(zip(remarks, theirs.values(), strict=True))
    found |= {row: errors(sampler(place), exact) for row, sampler in ROWS.items()}
    found[AUTO] = errors(by_its_own_rule(place), exact)
    found[ALONE] = errors({0: [by_class(known.influence)]}, exact)
    title = f"{place.problem.name}, step {place.step}, W = {WINDOW}, n_beta {place.density.n_beta:,.0f}"
    remarks |= {row: f" (and the solve's {known.gradients:,})" for row in found if row.endswith(FIRST_ORDER)}
    return Compared(title, judged, found, known.gradients, remarks)


def printed(found: Compared) -> Table:
    table = Table("error of", *(f"{budget:,} gradients" for budget in BUDGETS), "its own number")
    table.title = f"{found.title}\n{found.judged}"
    for row, error in found.rows.items():
        cells = [f"{error[budget]:.2g}" if budget in error else "-" for budget in BUDGETS]
        own = [f"{of:.2g} by {found.spent(row, spent):,}" for spent, of in error.items() if spent not in BUDGETS]
        table.add_row(row + found.remarks.get(row, ""), *cells, *own)
    return table


def window(problem: Problem) -> Table:
    """Standard errors of the window's own draws."""
    columns = ("step", "influence", "beyond first order", "error of draws alone", "with first order", "times less")
    table = Table(*columns)
    table.title = f"{problem.name}: 512 draws of sampler='window' and their reflections, W = {WINDOW}: nats"
    for step in problem.steps:
        sampling, posterior = (
            sw.Chains("window", chains=16, draws=32, linear=True, single_tokens=True),
            Place(problem, step).posterior,
        )
        tree = sample_block(problem.task, problem.run.load(step), posterior, sampling)
        known = sw.response_influence(problem.task, problem.run, posterior, at="checkpoint", steps=[step])
        traces = sw.TracesInMemory({step: tree}, problem.labels)
        alone, both = (sw.bif(traces, trusted_only=False, **more) for more in ({}, {"first_order": known}))
        values = (both["value"], both["value"] - known["value"], alone["stderr"], both["stderr"])
        *sizes, before, after = (float(np.sqrt((value**2).mean())) for value in values)
        table.add_row(str(step), *(f"{size:.2e}" for size in (*sizes, before, after)), f"{before / after:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of class-to-class influence per gradient.")
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment with peers-requirements.txt")
    parser.add_argument("--problem", choices=PROBLEMS, help="one of them alone")
    parser.add_argument("--steps", type=int, metavar="N", help="the first checkpoints alone")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="to draw the last problem in")
    options = parser.parse_args()
    peers = options.peers
    drawing, name = (partial(by_devinterp, peers), "devinterp") if peers else (by_this_package, "RMSprop-SGLD")
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for make in (PROBLEMS[one] for one in PROBLEMS if options.problem in (None, one)):
            problem, found = make(Path(folder)), list[Compared]()
            problem = problem._replace(steps=problem.steps[: options.steps])
            for step in problem.steps:
                found.append(compared(Place(problem, step), drawing, name))
                console.print(printed(found[-1]))
            console.print(window(problem))
    if options.figure:
        error_against_gradients(found).savefig(options.figure, dpi=150)
    console.print(f"{time.process_time() - start:.0f} seconds of processor time, without those of other processes")


if __name__ == "__main__":
    main()
