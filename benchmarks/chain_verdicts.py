"""How often the doctor calls chains "not converged" that are right, and that are wrong in known ways.

    python benchmarks/chain_verdicts.py [--runs 100] [--seed 0]

One number u per draw moves all losses: with the sign + in one group and - in the other, so that it cancels in the mean
loss, beside noise of each group's own. `error / stated` is the spread of the Bayesian influence over runs in units of
its root mean square stated standard error: 1 is right. `means` is how often the mean losses of the data sets alone give
the chains away, `products` how often these or the products of losses that influence averages do. What chains do wrong
is drawn anew in every run, so that by luck some runs of a few chains are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table
from scipy.signal import lfilter

import stagewise as sw
from stagewise.traces.diagnostics import diagnose

Array = np.ndarray[Any, np.dtype[np.float64]]
Generator = np.random.Generator
LABELS = {"train": list("aabb"), "queries": {"val": list("xxyy")}}
SIGNS = np.array([1.0, 1.0, -1.0, -1.0])
NOISE = 0.5
SHAPES = ((4, 200), (8, 64), (16, 64))


def ar1(rng: Generator, chains: int, draws: int, rho: float) -> Array:
    """Stationary, of unit variance."""
    noise = rng.standard_normal((chains, draws)) * np.sqrt(1 - rho**2)
    noise[:, 0] = rng.standard_normal(chains)
    series: Array = lfilter([1], [1, -rho], noise, axis=1)
    return series


def white(rng: Generator, chains: int, draws: int) -> Array:
    return rng.standard_normal((chains, draws))


KINDS: dict[str, Callable[[Generator, int, int], Array]] = {
    "independent draws": white,
    "autocorrelation 0.6": lambda rng, c, t: ar1(rng, c, t, 0.6),
    "autocorrelation 0.98": lambda rng, c, t: ar1(rng, c, t, 0.98),
    "autocorrelation 0.995": lambda rng, c, t: ar1(rng, c, t, 0.995),
    "chains offset by normal numbers": lambda rng, c, t: white(rng, c, t) + rng.standard_normal((c, 1)),
    "chains in one of two valleys, 4 apart": lambda rng, c, t: white(rng, c, t) + rng.choice([-2, 2], (c, 1)),
    "widths of chains log-normal, 0.3": lambda rng, c, t: white(rng, c, t) * np.exp(0.3 * rng.standard_normal((c, 1))),
    "widths of chains log-normal, 0.6": lambda rng, c, t: white(rng, c, t) * np.exp(0.6 * rng.standard_normal((c, 1))),
    "drift by 3 over a chain": lambda rng, c, t: white(rng, c, t) + np.linspace(-1.5, 1.5, t),
}


def traces(rng: Generator, u: Array) -> xr.DataTree:
    """A step's tree: losses of four samples on either side."""

    def group() -> xr.Dataset:
        losses = u[..., None] * SIGNS + NOISE * rng.standard_normal((*u.shape, 4))
        share, chain = np.full(4, 0.25), np.arange(len(u))
        data = {"loss": (("chain", "draw", "sample"), losses), "loss_anchor": ("sample", 0 * share)}
        return xr.Dataset(data | {"share": ("sample", share)}, {"chain": chain})

    chains = xr.Dataset({"status": ("chain", np.full(len(u), "ok"))}, {"chain": np.arange(len(u))})
    tree = xr.DataTree.from_dict({"/train": group(), "/queries/val": group(), "/chains": chains})
    tree.attrs = {"n_beta": 4.0}
    return tree


def row(kind: str, chains: int, draws: int, runs: int, seed: int) -> list[str]:
    """Of one kind of chains: how wrong stated errors are, and how often they are called "not converged"."""
    rng, values, squares, caught = np.random.default_rng(seed), [], [], np.zeros(2)
    for _ in range(runs):
        tree = traces(rng, KINDS[kind](rng, chains, draws))
        influence = sw.bif(sw.TracesInMemory({0: tree}, LABELS), trusted_only=False)
        values.append(influence["value"].values.ravel())
        squares.append(influence["stderr"].values.ravel() ** 2)
        alone = tree.drop_nodes("queries")  # no pair, no products; both sides have the same law
        caught += [str(diagnose(one, LABELS)["verdict"].item()) == "not converged" for one in (alone, tree)]
    ratio = float(np.sqrt(np.var(values, 0).mean() / np.mean(squares)))
    return [kind, f"{chains} x {draws}", f"{ratio:.2f}", *(f"{share:.0%}" for share in caught / runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Verdicts on chains that are known to be right or wrong.")
    parser.add_argument("--runs", type=int, default=100, help="of every kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = Table("chains", "chains x draws", "error / stated", "means", "products", box=None)
    for kind in KINDS:
        for shape in SHAPES:
            table.add_row(*row(kind, *shape, options.runs, options.seed))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
