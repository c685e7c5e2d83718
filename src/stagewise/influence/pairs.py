"""Two sets of loss traces to one matrix of influence: samples, tokens or groups against each other."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from stagewise.influence.covariance import (
    Centring,
    correlation_replicates,
    covariance_replicates,
    group_sums,
    mean_and_stderr,
)
from stagewise.traces.columns import Array, Columns, Indices

Kind = Literal["covariance", "correlation", "partial"]

# Numbers in one block of replicates (2 MB: larger ones leave the caches), and in those kept of one checkpoint (16 MB).
_BLOCK = 2**18
_KEPT = 2**21


class Estimator(NamedTuple):
    """How a covariance becomes influence: -kappa Cov, or -Corr (of residuals), with ``pieces`` replicates per chain."""

    kind: Kind
    centring: Centring
    scale: float
    pieces: int

    def sizes(self, side: Columns) -> Indices:
        """How many members of each row its sum is over: correlations are summed column by column."""
        return side.sizes if self.kind == "covariance" else side.lengths

    def pair_sums(self, train: Columns, query: Columns) -> Array:
        """Replicates of the influence summed over all pairs of columns of two rows: ``(replicate, train, query)``."""
        if self.kind == "covariance":
            total = self._covariance(train, query, train.traces, query.traces)
            for (sign, a), (_, b) in zip(train.also, query.also, strict=True):
                total += sign * self._covariance(train, query, a, b)
            return total
        fixed = None if train.controls is None or query.controls is None else (train.controls, query.controls)
        return self.scale * correlation_replicates(
            train.traces, query.traces, train.rows, query.rows, self.centring, self.pieces, fixed
        )

    def _covariance(self, train: Columns, query: Columns, a: Array, b: Array) -> Array:
        a, b = group_sums(a, train.rows), group_sums(b, query.rows)
        return covariance_replicates(self.scale * a, b, self.centring, self.pieces)


def influence_matrix(train: Columns, query: Columns, estimator: Estimator, shared: bool) -> xr.Dataset:
    """Mean influence of every train row on every query row.

    Args:
        train: one side.
        query: the other.
        estimator: what is estimated.
        shared: leave out pairs of a sample with itself (of two tokens of one sequence), unless a mean has no other
            pairs: both sides are the same samples.

    Returns:
        ``value`` and ``stderr`` ``(train, query)``, and ``replicates`` ``(replicate, train, query)`` unless they are
        more than 2^21 numbers; coordinates ``train_size`` and ``query_size``, the columns in a row.
    """
    rows, columns = len(train.names), len(query.names)
    count = len(train.traces) * estimator.pieces
    own = query.by_sample() if shared else {}
    value, stderr = np.empty((rows, columns)), np.empty((rows, columns))
    kept = np.empty((count, rows, columns)) if count * rows * columns <= _KEPT else None
    size = max(1, _BLOCK // (count * columns))
    for start in range(0, rows, size):
        block = slice(start, start + size)
        replicates = _mean_replicates(train.chosen(block), query, estimator, own)
        value[block], stderr[block] = mean_and_stderr(replicates)
        if kept is not None:
            kept[:, block] = replicates
    data: dict[str, Any] = {"value": (("train", "query"), value), "stderr": (("train", "query"), stderr)}
    if kept is not None:
        data["replicates"] = (("replicate", "train", "query"), kept)
    sizes = {"train_size": ("train", train.sizes), "query_size": ("query", query.sizes)}
    return xr.Dataset(data, {"train": train.names, "query": query.names} | sizes)


def _mean_replicates(
    train: Columns, query: Columns, estimator: Estimator, own: dict[int, tuple[Indices, Columns]]
) -> Array:
    """Replicates of the mean influence over pairs of columns, without those of one sample with its ``own``."""
    sums, pairs = estimator.pair_sums(train, query), np.outer(estimator.sizes(train), estimator.sizes(query))
    if pairs.max() == 1:
        return sums
    if not own:
        return sums / pairs
    same_sums, same_pairs = np.zeros_like(sums), np.zeros_like(pairs)
    for sample, (rows, left) in train.by_sample().items():
        if sample in own:
            columns, right = own[sample]
            same_sums[:, rows[:, None], columns] += estimator.pair_sums(left, right)
            same_pairs[rows[:, None], columns] += np.outer(estimator.sizes(left), estimator.sizes(right))
    others = pairs > same_pairs
    result: Array = np.where(others, sums - same_sums, sums) / np.where(others, pairs - same_pairs, pairs)
    return result
