"""Two sets of loss traces to one matrix of influence: samples, tokens or groups against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from stagewise.influence.covariance import (
    Centring,
    Scores,
    correlations,
    covariances,
    deviations,
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

    def side(self, columns: Columns) -> Side:
        """One side, made ready for the other."""
        sizes = self.sizes(columns)
        if self.kind != "covariance":
            scores = Scores.of(columns.traces, columns.rows, self.centring, self.pieces, columns.controls)
            return Side(sizes, (), scores)
        signed = [(1.0, columns.traces), *columns.also]
        moves = [(sign, deviations(group_sums(a, columns.rows), self.centring, self.pieces)) for sign, a in signed]
        return Side(sizes, moves, None)

    def pair_sums(self, train: Side, query: Side) -> Array:
        """Replicates of the influence summed over all pairs of columns of two rows: ``(replicate, train, query)``."""
        if train.scores is not None and query.scores is not None:
            return self.scale * correlations(train.scores, query.scores)
        (_, a), *more_a = train.deviations
        (_, b), *more_b = query.deviations
        total = covariances(self.scale * a, b, self.centring, self.pieces)
        for (sign, a), (_, b) in zip(more_a, more_b, strict=True):
            total += covariances(sign * self.scale * a, b, self.centring, self.pieces)
        return total


class Side(NamedTuple):
    """Rows of one side, made ready once for all rows of the other.

    Attributes:
        sizes: how many members of each row its sum is over.
        deviations: of covariances: of the sum of each row from its mean ``(chain, draw, row)``, with their signs.
        scores: of correlations.
    """

    sizes: Indices
    deviations: Sequence[tuple[float, Array]]
    scores: Scores | None


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
    side = estimator.side(query)
    own = {sample: (of, estimator.side(part)) for sample, (of, part) in query.by_sample().items()} if shared else {}
    value, stderr = np.empty((rows, columns)), np.empty((rows, columns))
    kept = np.empty((count, rows, columns)) if count * rows * columns <= _KEPT else None
    size = max(1, _BLOCK // (count * columns))
    for start in range(0, rows, size):
        block = slice(start, start + size)
        replicates = _mean_replicates(train.chosen(block), side, estimator, own)
        value[block], stderr[block] = mean_and_stderr(replicates)
        if kept is not None:
            kept[:, block] = replicates
    data: dict[str, Any] = {"value": (("train", "query"), value), "stderr": (("train", "query"), stderr)}
    if kept is not None:
        data["replicates"] = (("replicate", "train", "query"), kept)
    sizes = {"train_size": ("train", train.sizes), "query_size": ("query", query.sizes)}
    return xr.Dataset(data, {"train": train.names, "query": query.names} | sizes)


def _mean_replicates(
    columns: Columns, query: Side, estimator: Estimator, own: dict[int, tuple[Indices, Side]]
) -> Array:
    """Replicates of the mean influence over pairs of columns, without those of one sample with its ``own``."""
    train = estimator.side(columns)
    sums = estimator.pair_sums(train, query)
    if train.sizes.max() * query.sizes.max() == 1:
        return sums
    pairs = np.outer(train.sizes, query.sizes)
    if not own:
        return sums / pairs
    same_sums, same_pairs = np.zeros_like(sums), np.zeros_like(pairs)
    for sample, (rows, part) in columns.by_sample().items():
        if sample in own:
            left, (of, right) = estimator.side(part), own[sample]
            same_sums[:, rows[:, None], of] += estimator.pair_sums(left, right)
            same_pairs[rows[:, None], of] += np.outer(left.sizes, right.sizes)
    others = pairs > same_pairs
    result: Array = np.where(others, sums - same_sums, sums) / np.where(others, pairs - same_pairs, pairs)
    return result
