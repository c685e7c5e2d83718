"""The local learning coefficient where it is known: normal crossings and reduced-rank regression.

    python benchmarks/learning_coefficient.py [--only TEXT]

`llc` at singular points, with gamma = 1 and growing n_beta, against the exact rise n_beta E[L] of the same posterior
(an integral) and against the learning coefficient. The rise tends to the coefficient like a power of n_beta where the
multiplicity m is 1, and like 1 / log n_beta where m is 2. `err` is the relative error against the coefficient, of the
integral and of the chains; 0.1 is asked for. The curvature at a singular point says nothing of the steps that its arms
bear, so these are set by hand, 1 / sqrt(10 n_beta), with burn-in and thinning of 10 and 1 time units. SGLD needs a step
that is shorter than the square of that, and as many more steps. Burn-in is no part of the draws. Where the standard
error is large, a chain has been in an arm too steep even for these steps.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

import stagewise as sw
from stagewise.sampling.chains import sample_block
from stagewise.studies.singular import Singular, crossing, reduced_rank
from stagewise.traces.diagnostics import diagnose

console = Console(width=150)
GAMMA, CHAINS, DRAWS = 1.0, 256, 16
N_BETAS = (100, 1_000, 10_000)
ENOUGH = 0.1
COLUMNS = (
    "loss",
    "known",
    "m",
    "sampler",
    "n_beta",
    "integral",
    "llc",
    "err",
    "err (llc)",
    "<= 0.1",
    "verdict",
    "steps",
)


def problems() -> list[Singular]:
    return [
        crossing(2),
        crossing(2, 1),
        crossing(1, 1),
        reduced_rank(2, 1, 4, 0),
        reduced_rank(2, 2, 2, 0),
        reduced_rank(2, 1, 2, 0),
        reduced_rank(2, 2, 2, 1),
    ]


def underdamped(n_beta: float) -> sw.Chains:
    step = (10 * n_beta) ** -0.5
    times = {"burn_in": round(10 / step), "thinning": round(1 / step)}
    return sw.Chains("underdamped", CHAINS, draws=DRAWS, step_size=step, options={"friction": 1.0}, **settings(times))


def sgld(n_beta: float) -> sw.Chains:
    step = 0.5 / (10 * n_beta)
    return sw.Chains("sgld", CHAINS, draws=DRAWS, step_size=step, **settings({"burn_in": 8000, "thinning": 1000}))


def settings(times: dict[str, int]) -> dict[str, object]:
    return {"reflect": False, "batching": "stacked"} | times


def row(problem: Singular, n_beta: float, sampling: sw.Chains) -> list[str]:
    """One posterior, sampled and integrated."""
    start = time.process_time()
    posterior = sw.LocalPosterior(gamma=GAMMA, n_beta=n_beta, require_localised=False)
    tree = sample_block(problem.task, problem.checkpoint, posterior, sampling)
    seconds, verdict = time.process_time() - start, str(diagnose(tree)["verdict"].item())
    found = sw.llc(sw.TracesInMemory({0: tree}), trusted_only=False)
    value, error, exact = found["value"].item(), found["stderr"].item(), integral(problem, n_beta)
    off = abs(value / problem.coefficient - 1)
    return [
        problem.name,
        f"{problem.coefficient:.3g}",
        str(problem.multiplicity),
        sampling.sampler,
        f"{n_beta:,}",
        "-" if exact is None else f"{exact:.3f}",
        f"{value:.3f} ± {error:.3f}",
        "-" if exact is None else f"{abs(exact / problem.coefficient - 1):.2f}",
        f"{off:.2f} ± {error / problem.coefficient:.2f}",
        "yes" if off <= ENOUGH else "no",
        verdict,
        f"{sampling.burn_in + DRAWS * sampling.thinning:,}",  # type: ignore[operator]
        f"{seconds:.1f}",
    ]


def integral(problem: Singular, n_beta: float) -> float | None:
    """None where importance sampling finds too little."""
    try:
        return problem.rise(n_beta, GAMMA)
    except ValueError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Known learning coefficients.")
    parser.add_argument("--only", default="", metavar="TEXT", help="losses whose name holds TEXT, e.g. 'rank 0'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    table = Table(title=f"gamma = {GAMMA:g}, {CHAINS} x {DRAWS} draws")
    for name in (*COLUMNS, "seconds"):
        table.add_column(name, no_wrap=True)
    for problem in problems():
        if options.only in problem.name:
            for n_beta in N_BETAS:
                table.add_row(*row(problem, n_beta, underdamped(n_beta)))
            if problem.name == "crossing w1^2 w2^2":
                table.add_row(*row(problem, N_BETAS[0], sgld(N_BETAS[0])))
            table.add_section()
    console.print(table)
    console.print(f"{time.process_time() - start:.0f} seconds of processor time")


if __name__ == "__main__":
    main()
