"""Which training samples or tokens matter most to every query, without the matrix of all pairs.

A thousand sequences of five hundred tokens have 10^11 pairs of tokens, whose matrix nobody could hold or read. The
covariances are made block by block in float32, the largest of each query are kept, and of those alone value and
standard error are computed as :func:`stagewise.bif` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stagewise.groups import Labels
from stagewise.influence.covariance import group_sums, mean_and_stderr
from stagewise.influence.trusted import Traces, as_traces, data_sets, joined, over_checkpoints
from stagewise.traces.columns import Array, Columns, Indices, Part
from stagewise.traces.stretches import stretches

_BLOCK = 2**22
"""Pairs at a time."""

WAYS = ("helpful", "harmful")


def strongest(
    traces: Traces | str | Path,
    count: int = 10,
    *,
    query_groups: Mapping[str, Labels | None] | None = None,
    part: Part = "full",
    tokens: bool = False,
    self_pairs: bool = True,
    trusted_only: bool = True,
) -> xr.Dataset:
    """The training samples, or tokens, that help and that harm every query most, at every checkpoint.

    The largest of many noisy numbers are too large: look at ``stderr`` before you believe in a first place.

    Args:
        traces: loss traces, or the run folder that holds them.
        count: how many of each way; all where there are fewer.
        query_groups: labels by query name; a query set without labels is single samples, or tokens.
        part: as in :func:`stagewise.bif`.
        tokens: one column per token, on both sides; otherwise a sample's loss is the weighted mean over its tokens.
        self_pairs: False leaves out the pairs of a sample (or of two tokens of one sequence) with itself where a query
            set holds the candidates themselves.
        trusted_only: leave out checkpoints whose chains cannot be trusted; attribute ``omitted`` says which and why.

    Returns:
        Dataset with ``train``, the name of the sample or token (``sample/token``), ``value`` and ``stderr``, in nats
        per unit weight of one of them, ``(step, query, way, rank)`` with the strongest first; ``way`` is ``"helpful"``
        (most negative) or ``"harmful"`` (most positive). Where a sample's pairs with itself leave too few, ``train`` is
        empty and the numbers are NaN. To 1e-6 they are those of :func:`stagewise.bif`.

    Raises:
        NoTrustedCheckpointError: no checkpoint can be trusted, with the reasons.
        ValueError: ``count`` is not positive, labels do not fit the traces, or groups are asked for without the pairs
            of a sample with itself.

    Example:
        >>> import torch, stagewise as sw
        >>> from stagewise.sampling.chains import sample_block
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)},
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> tree = sample_block(task, start, sw.LocalPosterior(window=10), sw.Chains(chains=8, draws=64))
        >>> found = sw.strongest(sw.TracesInMemory({0: tree}), 2)
        >>> found.train.dims, found.train.shape
        (('step', 'query', 'way', 'rank'), (1, 4, 2, 2))
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    traces = as_traces(traces)

    def estimate(_step: int, tree: xr.DataTree) -> xr.Dataset:
        sides = data_sets(tree, (None, dict(query_groups or {})), False, part, tokens, self_pairs)
        pieces = stretches(tree["chains"].sizes["chain"], tree["train"].sizes["draw"])
        found = [
            _of_queries(sides.train, query, count, -sides.weight, pieces, shared) for query, shared in sides.queries
        ]
        return joined(found, "query")

    result = over_checkpoints(traces, traces.steps, trusted_only, estimate)
    units = "nats per unit weight"
    result.attrs |= {"estimator": "bif", "part": part, "tokens": tokens, "self_pairs": self_pairs, "units": units}
    for name in ("value", "stderr"):
        result[name].attrs["units"] = units
    return result


def _of_queries(train: Columns, query: Columns, count: int, scale: float, pieces: int, apart: bool) -> xr.Dataset:
    """The strongest of every row of queries; ``apart`` leaves out pairs within a sample."""
    if apart and query.rows is not None:
        raise ValueError("self_pairs=False needs single queries; leave query_groups out, or keep the pairs")
    spare = query.traces.shape[1] % pieces
    a, b = train.traces[:, spare:], group_sums(query.traces, query.rows)[:, spare:] / query.sizes
    a = a if train.counts is None else a / train.counts
    count = min(count, len(train.names))
    chosen = _largest(a, b, count, train.samples, query.samples if apart else None)
    value, stderr = (np.full(chosen.shape, np.nan) for _ in range(2))
    size = max(1, _BLOCK // (a.shape[0] * a.shape[1] * chosen[0].size))
    for start in range(0, len(chosen), size):
        rows = slice(start, start + size)
        value[rows], stderr[rows] = _estimated(a, b[..., rows], np.maximum(chosen[rows], 0), scale, pieces)
    missing = chosen < 0
    value[missing] = stderr[missing] = np.nan
    dims = ("query", "way", "rank")
    names = np.where(missing, "", np.array(train.names)[chosen])
    data = {"train": (dims, names), "value": (dims, value), "stderr": (dims, stderr)}
    return xr.Dataset(data, {"query": query.names, "way": list(WAYS), "rank": np.arange(count)})


def _largest(a: Array, b: Array, count: int, own: Indices, others: Indices | None) -> Indices:
    """Columns of ``a`` whose covariance with every column of ``b`` is largest and smallest ``(B, 2, count)``.

    Influence is minus the covariance: the largest help most. -1 where too few are left.
    """
    right, size = torch.from_numpy(_flat(b - b.mean((0, 1))).astype(np.float32)), math.isqrt(_BLOCK)
    best = torch.full((2, count, right.shape[1]), -torch.inf)
    which = torch.full(best.shape, -1, dtype=torch.long)
    for start, left in _blocks(a, size):
        for first in range(0, right.shape[1], size):
            queries = slice(first, first + size)
            products = left.T @ right[:, queries]
            same = None
            if others is not None:
                same = torch.from_numpy(own[start : start + len(products), None] == others[queries])
            for way, sign in enumerate((1.0, -1.0)):
                products *= sign
                if same is not None:
                    products.masked_fill_(same, -torch.inf)
                _enter(products, start, best[way][:, queries], which[way][:, queries])
    which[best == -torch.inf] = -1
    found: Indices = which.permute(2, 0, 1).numpy()
    return found


def _enter(products: Tensor, start: int, best: Tensor, which: Tensor) -> None:
    """Put what is larger into the ``best (rank, query)`` so far, in place, and its row, counted from ``start``."""
    # Soon few queries find anything larger in a block, and only theirs is sorted.
    found = (products.amax(0) > best[-1]).nonzero()[:, 0]
    values, rows = torch.cat([best[:, found], products[:, found]]).topk(len(best), 0)
    kept = which[:, found].gather(0, rows.clamp(max=len(best) - 1))
    best[:, found], which[:, found] = values, torch.where(rows < len(best), kept, rows - len(best) + start)


def _blocks(a: Array, size: int) -> Iterator[tuple[int, Tensor]]:
    """Deviations of some columns at a time from their means ``(chain x draw, column)``, and the first of them."""
    for start in range(0, a.shape[-1], size):
        part = a[..., start : start + size]
        yield start, torch.from_numpy(_flat(part - part.mean((0, 1))).astype(np.float32))


def _flat(trace: Array) -> Array:
    return trace.reshape(-1, trace.shape[-1])


def _estimated(a: Array, b: Array, chosen: Indices, scale: float, pieces: int) -> tuple[Array, Array]:
    """Influence of the ``chosen (B, way, rank)`` columns of ``a`` on every column of ``b``, and its standard error."""
    left = a[..., chosen]
    left, right = left - left.mean((0, 1)), (b - b.mean((0, 1)))[..., None, None]
    chains, draws = a.shape[:2]
    products = (left * right).reshape(chains * pieces, -1, *chosen.shape).sum(1)
    return mean_and_stderr(products * (scale * len(products) / (chains * draws - 1)))
