"""Whether chains agree about what influence averages: the centred products of a training and a query loss.

Chains may agree about every mean loss and still not about its covariances: when they move in valleys of different
width, or together here and against each other there; and what two groups do may cancel in the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import fdtrc

from stagewise.traces.columns import Array, Columns, columns

MOST_PAIRS = 64


def product_numbers(groups: Mapping[str, xr.Dataset], labels: Mapping[str, Any], pieces: int) -> dict[str, float]:
    """What the products (a - mean a)(b - mean b) say, of at most 64 pairs of a training row a and a query row b.

    Rows are those of :func:`stagewise.bif`: means over the samples (tokens) of one label, where there are labels;
    without them single training samples, and the mean of a query set. The pairs are evenly spaced over all of them in
    order, a training row with every query row before the next one. A pair with a row that never changes is left out.

    Args:
        groups: ``loss`` ``(chain, draw, sample[, token])`` and ``share`` of ``train`` and of every ``queries/...``.
        labels: ``{"train": labels or None, "queries": {name: labels or None}}``, or empty.
        pieces: the stretches of each chain from which the standard errors of influence are taken.

    Returns:
        Empty where there is no pair; a number that is not defined is left out.

        * ``rhat_rows``, ``rhat_products``: rank-normalised split R-hat, the largest of all rows and of all products;
        * ``ess_rows``, ``ess_products``: effective number of draws of all chains together, the smallest;
        * ``mcse_products``: Monte Carlo standard error of the mean product over the standard deviations of a and b,
          that is in units of a correlation, the largest of all pairs;
        * ``between_share``: the share of the covariances that lies between the means of chains, |between| / (|between|
          + |within|), where | | is the root of the sum of squares over pairs, in units of correlations;
        * ``drift_share``: the share of the variance of a row within chains that a straight line over the draws
          of each chain explains, the largest of all rows;
        * ``chains_p``: the probability that chains whose stretches are independent have mean products as different as
          these, by the F-test over all pairs together; absent where each chain is one stretch. If it is tiny, standard
          errors from stretches are too small.

    Raises:
        ValueError: labels do not fit the traces.
    """
    a, b = _pairs(groups, labels)
    moves = (np.ptp(a, (0, 1)) > 0) & (np.ptp(b, (0, 1)) > 0)
    if not moves.any():
        return {}
    a, b = _standardised(a[..., moves]), _standardised(b[..., moves])
    rows, products = np.unique(np.concatenate([a, b], -1), axis=-1), a * b
    between = (a.mean(1) * b.mean(1)).mean(0)
    sizes = [float(np.linalg.norm(part)) for part in (between, products.mean((0, 1)) - between)]
    numbers = _of_series(rows, products) | {
        "between_share": sizes[0] / sum(sizes),
        "drift_share": _line_share(rows),
    }
    if pieces > 1:
        numbers["chains_p"] = _chains_p(products, pieces)
    return {name: value for name, value in numbers.items() if not np.isnan(value)}


def arviz() -> Any:
    """Imported where chains are judged: processes that only sample start two seconds earlier without it."""
    import arviz_stats

    return arviz_stats  # calls itself typed, but is not


def _pairs(groups: Mapping[str, xr.Dataset], labels: Mapping[str, Any]) -> tuple[Array, Array]:
    """The rows on both sides of every pair: ``(chain, draw, pair)`` each."""
    train, of_queries = _rows(groups["train"], labels.get("train"), "train_groups"), labels.get("queries", {})
    rows: list[tuple[Columns, int]] = []
    for path, group in groups.items():
        if path != "train":
            name = path.removeprefix("queries/")
            given = of_queries.get(name)
            named = [name] * group.sizes["sample"] if given is None else given
            side = _rows(group, named, f"query_groups[{name!r}]")
            rows += [(side, row) for row in range(len(side.names))]
    count = len(train.names) * len(rows)
    chosen = np.unique(np.linspace(0, count - 1, min(MOST_PAIRS, count)).round().astype(int)).tolist()
    shape = (*train.traces.shape[:2], len(chosen))
    a, b = np.zeros(shape), np.zeros(shape)
    for k, pair in enumerate(chosen):
        a[..., k], b[..., k] = _row(train, pair // len(rows)), _row(*rows[pair % len(rows)])
    return a, b


def _rows(group: xr.Dataset, labels: Any, argument: str) -> Columns:
    changes = group.assign(loss=group["loss"] - group["loss_anchor"])
    return columns(changes, np.arange(group.sizes["chain"]), labels, argument)


def _row(side: Columns, row: int) -> Array:
    series: Array = side.traces[..., row] if side.rows is None else side.traces[..., side.rows[row]].mean(-1)
    return series


def _standardised(rows: Array) -> Array:
    scores: Array = (rows - rows.mean((0, 1))) / rows.std((0, 1))
    return scores


def _of_series(rows: Array, products: Array) -> dict[str, float]:
    az, dims, numbers = arviz(), ["chain", "draw"], dict[str, float]()
    with np.errstate(divide="ignore", invalid="ignore"):  # frozen chains: R-hat is infinite
        for name, values in (("rows", rows), ("products", products)):
            series = xr.DataArray(values, dims=[*dims, "series"])
            numbers[f"rhat_{name}"] = az.rhat(series, sample_dims=dims).max(skipna=False).item()
            numbers[f"ess_{name}"] = az.ess(series, sample_dims=dims, method="bulk").min(skipna=False).item()
        numbers["mcse_products"] = az.mcse(series, sample_dims=dims, method="mean").max(skipna=False).item()
    return numbers


def _line_share(rows: Array) -> float:
    within = rows - rows.mean(1, keepdims=True)
    time = np.arange(rows.shape[1]) - (rows.shape[1] - 1) / 2
    lines = (np.tensordot(time, within, (0, 1)) ** 2).sum(0) / (time**2).sum()
    total = (within**2).sum((0, 1))
    return float(np.divide(lines, total, out=np.zeros_like(lines), where=total > 0).max())


def _chains_p(products: Array, pieces: int) -> float:
    """One-way analysis of variance of the means of stretches, a chain being a class; sums over pairs."""
    chains, draws = products.shape[:2]
    length = draws // pieces
    means = products[:, draws - pieces * length :].reshape(chains, pieces, length, -1).mean(2)
    of_chains = means.mean(1, keepdims=True)
    between = pieces * ((of_chains - of_chains.mean(0)) ** 2).sum() / (chains - 1)
    within = ((means - of_chains) ** 2).sum() / (chains * (pieces - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(fdtrc(chains - 1, chains * (pieces - 1), np.divide(between, within)))
