"""The losses of one data set as columns: one per sample or token, weighted, and the rows of a result they make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr

from stagewise.groups import Groups
from stagewise.labels import NONE, Labels, as_labels

Part = Literal["full", "odd", "even"]
Recorded = Literal[Part, "linear"]
"""Parts of the losses, and what they are to first order."""
Array = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.intp]]


@dataclass(frozen=True)
class Columns:
    """The loss traces of one data set, a column per sample or token, and the rows of the result they make up.

    A column may also stand for several tokens of a sample, being the sum of theirs.

    Attributes:
        traces: ``(chain, draw, column)``, nats, times the column's weight: for candidates its share of the training
            objective over the mean share of one token, for queries its share of the row over the mean share there. 1
            where all count alike.
        samples: the sample that each column belongs to.
        names: one per row.
        rows: the columns that each row averages over; None where every column is a row.
        share: mean share of a sample (a token) in the mean over the whole data set.
        counts: how many tokens each column stands for; None where it is one.
        controls: ``(chain, draw, column)``, what a partial correlation holds fixed for each, if one is asked for.
        also: other traces of the same columns with a sign, by which their covariance counts too.
    """

    traces: Array
    samples: Indices
    names: list[str]
    rows: list[Indices] | None = None
    share: float = 1.0
    counts: Indices | None = None
    controls: Array | None = None
    also: Sequence[tuple[float, Array]] = ()

    @property
    def lengths(self) -> Indices:
        """Columns in each row."""
        return np.array([len(row) for row in self.rows] if self.rows else [1] * len(self.names))

    @property
    def sizes(self) -> Indices:
        """Samples, or tokens, in each row."""
        if self.counts is None:
            return self.lengths
        return np.array([self.counts[row].sum() for row in self.rows]) if self.rows else self.counts

    def chosen(self, rows: slice) -> Columns:
        """Some of the rows, with their columns only."""
        names = self.names[rows]
        if self.rows is None:
            return self._of(rows, names, None)
        cuts = np.cumsum([len(row) for row in self.rows[rows]])
        return self._of(np.concatenate(self.rows[rows]), names, np.split(np.arange(cuts[-1]), cuts[:-1]))

    def _of(self, columns: Indices | slice, names: list[str], rows: list[Indices] | None) -> Columns:
        """Some of the columns."""
        counts = None if self.counts is None else self.counts[columns]
        controls = None if self.controls is None else self.controls[..., columns]
        also = [(sign, traces[..., columns]) for sign, traces in self.also]
        traces, samples = self.traces[..., columns], self.samples[columns]
        return Columns(traces, samples, names, rows, self.share, counts, controls, also)

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
            parts[sample] = present, self._of(columns, names, rows)
        return parts


def columns(
    dataset: xr.Dataset,
    kept: Indices,
    labels: Labels | None,
    argument: str,
    *,
    part: Recorded = "full",
    tokens: bool = False,
) -> Columns:
    """The columns of one data set over the chains that are kept. Tokens without weight or label are in no column.

    A sample without weight is one of its group, as it is for all estimators: its influence is 0.

    Args:
        dataset: ``loss``, ``share`` and perhaps ``loss_reflected`` ``(chain, draw, sample[, token])``; a coordinate
            ``sample`` gives the samples' numbers.
        kept: positions of the chains.
        labels: of every sample, or of every token ``(sample, token)``, or one row of them for all samples; None: every
            column is a row.
        argument: how error messages call the labels; ``"train_groups"`` for candidates.
        part: which part of the losses under reflection.
        tokens: one column per token, as with labels of tokens; otherwise a sample's loss is the weighted mean over its
            tokens.

    Raises:
        ValueError: the traces have no tokens or reflected losses, or there is not one label per column.
    """
    named = None if labels is None else as_labels(labels, len(labels), argument)
    tokens = tokens or (named is not None and named.ndim == 2)
    loss, share = losses_of(dataset, kept, part), dataset["share"].values
    counts = dataset["tokens"].values.astype(np.intp) if "tokens" in dataset and tokens else None
    if tokens and loss.ndim == 3:
        raise ValueError(
            f"{'tokens=True' if named is None else argument} needs a loss that returns (batch, tokens); these traces "
            "have one loss per sample"
        )
    if loss.ndim == 4 and not tokens:
        whole = share.sum(-1)
        loss = np.einsum("cdst,st->cds", loss, share / np.where(whole > 0, whole, 1.0)[:, None])
        share = whole
    counted, numbers = share > 0 if tokens else np.ones(share.shape, dtype=bool), dataset["sample"].values
    if named is not None:
        named = _of_columns(named, counted.shape, numbers, argument, by_label=counts is not None)
        counted = counted & (named != NONE)
    samples, share = np.indices(counted.shape)[0][counted], share[counted]
    traces = loss.reshape(*loss.shape[:2], -1) if counted.all() else loss[..., counted]
    members = np.ones(len(share), dtype=np.intp) if counts is None else counts[counted]
    if named is None:
        places = np.stack(np.nonzero(counted), 1).tolist()
        names = ["/".join(map(str, (int(numbers[place[0]]), *place[1:]))) for place in places]
        rows = None
    else:
        groups = Groups.of_labels(named[counted], argument)
        names, rows = list(groups.labels), [index.numpy() for index in groups.indices]
    weights = share * (members.sum() / share.sum())
    if argument != "train_groups":
        weights = _within(weights, members, rows)
    if not np.allclose(weights, 1.0, rtol=1e-9):
        traces = traces * weights
    whole = float(share.sum() / members.sum())
    return Columns(traces, samples, names, rows, whole, None if counts is None else members)


def _of_columns(
    array: np.ndarray[Any, Any], shape: tuple[int, ...], numbers: Indices, argument: str, by_label: bool = False
) -> np.ndarray[Any, Any]:
    """One label per column, from labels of all columns, of all samples, or of the whole training set."""
    if len(array) > shape[0] > 0 and numbers.max() < len(array):
        array = array[numbers]
    if array.shape not in (shape, shape[:1], (1, *shape[1:])):
        expected = " or ".join(str(s) for s in dict.fromkeys((shape[:1], shape)))
        raise ValueError(
            f"{argument}: expected labels of shape {expected}, got {array.shape}"
            + "; these traces hold the mean loss of every label in a sample: group by the labels that they carry, or "
            "sample with single_tokens=True" * by_label
        )
    broadcast: np.ndarray[Any, Any] = np.broadcast_to(
        array.reshape(*array.shape, *[1] * (len(shape) - array.ndim)), shape
    )
    return broadcast


def _within(weights: Array, members: Indices, rows: list[Indices] | None) -> Array:
    """Weights over their mean in each row, a column having that of all its members."""
    if rows is None:
        return members.astype(np.float64)
    relative = np.zeros_like(weights)
    for row in rows:
        relative[row] = weights[row] * (members[row].sum() / max(weights[row].sum(), 1e-30))
    return relative


def losses_of(dataset: xr.Dataset, kept: Indices, part: Recorded) -> Array:
    """Losses of some chains, or their odd or even part under reflection: ``(chain, draw, sample[, token])``.

    Raises:
        ValueError: the traces have no reflected losses.
    """
    if part == "linear":
        return _of_chains(dataset["loss_linear"], kept)
    loss = _of_chains(dataset["loss"], kept)
    if part == "full":
        return loss
    if "loss_reflected" not in dataset:
        raise ValueError(f"part={part!r} needs traces sampled with reflect=True; these have no reflected losses")
    mirrored = _of_chains(dataset["loss_reflected"], kept)
    return (loss - mirrored) / 2 if part == "odd" else (loss + mirrored) / 2


def _of_chains(losses: xr.DataArray, kept: Indices) -> Array:
    """As float64; not copied where nothing is left out, for they can be most of the memory."""
    values = losses.values if len(kept) == len(losses) else losses.values[kept]
    result: Array = values.astype(np.float64, copy=False)
    return result
