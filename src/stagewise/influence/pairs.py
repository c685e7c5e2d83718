"""Two sets of loss traces to one matrix of influence: samples, tokens or groups against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from stagewise.groups import Groups, Labels
from stagewise.influence.covariance import (
    Array,
    Centring,
    correlation_replicates,
    covariance_replicates,
    group_sums,
    mean_and_stderr,
)

Kind = Literal["covariance", "correlation"]
Part = Literal["full", "odd", "even"]
Indices = np.ndarray[Any, np.dtype[np.intp]]

# Numbers in one block of replicates (64 MB), and in those kept of one checkpoint (16 MB).
_BLOCK = 2**23
_KEPT = 2**21


@dataclass(frozen=True)
class Columns:
    """The loss traces of one data set, a column per sample or token, and the rows of the result they make up.

    Attributes:
        traces: ``(chain, draw, column)``, nats, times the column's weight: for candidates its share of the training
            objective over the mean share, for queries its share of the row over the mean share there. 1 where all
            count alike.
        samples: the sample that each column belongs to.
        names: one per row.
        rows: the columns that each row averages over; None where every column is a row.
        share: mean share of a column in the mean over the whole data set.
    """

    traces: Array
    samples: Indices
    names: list[str]
    rows: list[Indices] | None = None
    share: float = 1.0

    @property
    def sizes(self) -> Indices:
        """Columns in each row."""
        return np.array([len(row) for row in self.rows] if self.rows else [1] * len(self.names))

    def chosen(self, rows: slice) -> Columns:
        """Some of the rows, with their columns only."""
        names = self.names[rows]
        if self.rows is None:
            return Columns(self.traces[..., rows], self.samples[rows], names, share=self.share)
        columns = np.concatenate(self.rows[rows])
        cuts = np.cumsum([len(row) for row in self.rows[rows]])[:-1]
        return Columns(
            self.traces[..., columns],
            self.samples[columns],
            names,
            np.split(np.arange(len(columns)), cuts),
            self.share,
        )

    def by_sample(self) -> dict[int, tuple[Indices, Columns]]:
        """For every sample its own columns, and the rows of this set they belong to."""
        row_of = np.arange(len(self.samples))
        for number, row in enumerate(self.rows or []):
            row_of[row] = number
        order = np.argsort(self.samples, kind="stable")
        samples, starts = np.unique(self.samples[order], return_index=True)
        parts: dict[int, tuple[Indices, Columns]] = {}
        for sample, columns in zip(samples.tolist(), np.split(order, starts[1:]), strict=True):
            present, position = np.unique(row_of[columns], return_inverse=True)
            rows = [np.flatnonzero(position == k) for k in range(len(present))]
            names = [self.names[row] for row in present]
            parts[sample] = present, Columns(self.traces[..., columns], self.samples[columns], names, rows)
        return parts


class Estimator(NamedTuple):
    """How a covariance becomes influence: -kappa Cov, or -Corr, with ``pieces`` replicates per chain."""

    kind: Kind
    centring: Centring
    scale: float
    pieces: int

    def pair_sums(self, train: Columns, query: Columns) -> Array:
        """Replicates of the influence summed over all pairs of columns of two rows: ``(replicate, train, query)``."""
        if self.kind == "covariance":
            a, b = (group_sums(side.traces, side.rows) for side in (train, query))
            return self.scale * covariance_replicates(a, b, self.centring, self.pieces)
        return self.scale * correlation_replicates(
            train.traces, query.traces, train.rows, query.rows, self.centring, self.pieces
        )


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
    per_row = len(train.traces) * estimator.pieces * len(query.names)
    keep = per_row * len(train.names) <= _KEPT
    own = query.by_sample() if shared else {}
    size = max(1, _BLOCK // per_row)
    blocks = []
    for start in range(0, len(train.names), size):
        rows = train.chosen(slice(start, start + size))
        replicates = _mean_replicates(rows, query, estimator, own)
        value, stderr = mean_and_stderr(replicates)
        data: dict[str, Any] = {"value": (("train", "query"), value), "stderr": (("train", "query"), stderr)}
        if keep:
            data["replicates"] = (("replicate", "train", "query"), replicates)
        coords = {"train": rows.names, "train_size": ("train", rows.sizes)}
        blocks.append(xr.Dataset(data, coords))
    matrix = xr.concat(blocks, "train") if len(blocks) > 1 else blocks[0]
    return matrix.assign_coords(query=query.names, query_size=("query", query.sizes))


def _mean_replicates(
    train: Columns, query: Columns, estimator: Estimator, own: dict[int, tuple[Indices, Columns]]
) -> Array:
    """Replicates of the mean influence over pairs of columns, without those of one sample with its ``own``."""
    sums, pairs = estimator.pair_sums(train, query), np.outer(train.sizes, query.sizes)
    if not own or pairs.max() == 1:
        return sums / pairs
    same_sums, same_pairs = np.zeros_like(sums), np.zeros_like(pairs)
    for sample, (rows, left) in train.by_sample().items():
        if sample in own:
            columns, right = own[sample]
            same_sums[:, rows[:, None], columns] += estimator.pair_sums(left, right)
            same_pairs[rows[:, None], columns] += np.outer(left.sizes, right.sizes)
    others = pairs > same_pairs
    result: Array = np.where(others, sums - same_sums, sums) / np.where(others, pairs - same_pairs, pairs)
    return result


def columns(
    dataset: xr.Dataset,
    kept: Indices,
    labels: Labels | None,
    argument: str,
    *,
    part: Part = "full",
    tokens: bool = False,
) -> Columns:
    """The columns of one data set over the chains that are kept. Tokens without weight are in no column.

    A sample without weight is one of its group, as it is for all estimators: its influence is 0.

    Args:
        dataset: ``loss``, ``share`` and perhaps ``loss_reflected`` ``(chain, draw, sample[, token])``; a coordinate
            ``sample`` gives the samples' numbers.
        kept: positions of the chains.
        labels: of every sample, or of every token with ``tokens``; None: every column is a row.
        argument: how error messages call the labels; ``"train_groups"`` for candidates.
        part: which part of the losses under reflection.
        tokens: one column per token; otherwise a sample's loss is the weighted mean over its tokens.

    Raises:
        ValueError: the traces have no tokens or reflected losses, or there is not one label per column.
    """
    loss, share = losses_of(dataset, kept, part), dataset["share"].values
    if tokens and loss.ndim == 3:
        raise ValueError("tokens=True needs a loss that returns (batch, tokens); these traces have one loss per sample")
    if loss.ndim == 4 and not tokens:
        whole = share.sum(-1)
        loss = np.einsum("cdst,st->cds", loss, share / np.where(whole > 0, whole, 1.0)[:, None])
        share = whole
    counted = share > 0 if tokens else np.ones(share.shape, dtype=bool)
    numbers = dataset["sample"].values
    samples, share, traces = np.indices(counted.shape)[0][counted], share[counted], loss[..., counted]
    if labels is None:
        places = np.stack(np.nonzero(counted), 1).tolist()
        names = ["/".join(map(str, (int(numbers[place[0]]), *place[1:]))) for place in places]
        rows = None
    else:
        groups = Groups.of_labels(_of_columns(labels, counted.shape, numbers, argument)[counted], argument)
        names, rows = list(groups.labels), [index.numpy() for index in groups.indices]
    weights = share / share.mean()
    if argument != "train_groups":
        weights = _within(weights, rows)
    if not np.allclose(weights, 1.0, rtol=1e-9):
        traces = traces * weights
    return Columns(traces, samples, names, rows, float(share.mean()))


def _of_columns(labels: Labels, shape: tuple[int, ...], numbers: Indices, argument: str) -> np.ndarray[Any, Any]:
    """One label per column, from labels of all columns, of all samples, or of the whole training set."""
    array = np.asarray(labels)
    if array.ndim and len(array) > shape[0] > 0 and numbers.max() < len(array):
        array = array[numbers]
    if array.shape not in (shape, shape[:1]):
        expected = " or ".join(str(s) for s in dict.fromkeys((shape[:1], shape)))
        raise ValueError(f"{argument}: expected labels of shape {expected}, got {array.shape}")
    broadcast: np.ndarray[Any, Any] = np.broadcast_to(
        array.reshape(*array.shape, *[1] * (len(shape) - array.ndim)), shape
    )
    return broadcast


def _within(weights: Array, rows: list[Indices] | None) -> Array:
    """Weights over their mean in each row."""
    if rows is None:
        return np.ones_like(weights)
    relative = np.empty_like(weights)
    for row in rows:
        relative[row] = weights[row] / max(weights[row].mean(), 1e-30)
    return relative


def losses_of(dataset: xr.Dataset, kept: Indices, part: Part) -> Array:
    """Losses of some chains, or their odd or even part under reflection: ``(chain, draw, sample[, token])``.

    Raises:
        ValueError: the traces have no reflected losses.
    """
    loss = dataset["loss"].values[kept].astype(np.float64)
    if part == "full":
        return loss
    if "loss_reflected" not in dataset:
        raise ValueError(f"part={part!r} needs traces sampled with reflect=True; these have no reflected losses")
    mirrored = dataset["loss_reflected"].values[kept].astype(np.float64)
    return (loss - mirrored) / 2 if part == "odd" else (loss + mirrored) / 2
