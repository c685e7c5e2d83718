"""The mode in which all losses move together, which a partial correlation holds fixed.

Where the loss of every sample rises and falls with that of all others, every correlation is large and says little about
the pair. Each loss is therefore regressed on the mean loss of all training samples but its own,

    m_i = sum_(k != i) a_k l_k / sum_(k != i) a_k,      r_i = l_i - m_i Cov(l_i, m_i) / Var(m_i),

and Corr(r_i, r_j) is the partial correlation. k counts samples, i.e. whole sequences: a token's own sequence shares its
context. A query that is no training sample has nothing to leave out. Without leaving out, residuals would sum to nearly
zero, and independent losses would seem opposed. What remains of that between two training samples is of the size
1 / samples: l_j is one part of m_i, so that beside a strong common mode unrelated losses have about -1 / samples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from stagewise.influence.trusted import DataSets, ok_chains
from stagewise.traces.columns import Array, Columns, Indices, Part, losses_of


def controlled(sides: DataSets, tree: xr.DataTree, part: Part) -> DataSets:
    """Both sides, each column with the mean loss of the training samples that it is not of.

    Args:
        sides: columns of the chains that ended well.
        tree: all chains of the checkpoint.
        part: which part of the losses, as in the columns.

    Raises:
        ValueError: only one training sample was sampled.
    """
    everything, others = _means(tree["train"].to_dataset(), ok_chains(tree), part)
    queries = []
    for (query, shared), dataset in zip(sides.queries, tree["queries"].children.values(), strict=True):
        own = bool(dataset.attrs.get("is_training_set"))
        controls = others[..., query.samples] if own else _repeated(everything, query)
        queries.append((replace(query, controls=controls), shared))
    return sides._replace(train=replace(sides.train, controls=others[..., sides.train.samples]), queries=queries)


def _means(dataset: xr.Dataset, kept: Indices, part: Part) -> tuple[Array, Array]:
    """Mean loss ``(chain, draw, 1)``, and for every sample that of all others ``(chain, draw, sample)``."""
    loss, share = losses_of(dataset, kept, part), dataset["share"].values
    sums = np.einsum("cdst,st->cds", loss, share) if loss.ndim == 4 else loss * share
    weights = share.sum(-1) if loss.ndim == 4 else share
    if np.count_nonzero(weights) < 2:
        raise ValueError(
            "kind='partial' holds the mean loss of the other training samples fixed, but the traces have only one; "
            "sample more candidates, or take kind='correlation'"
        )
    whole = sums.sum(-1, keepdims=True)
    return whole / weights.sum(), (whole - sums) / (weights.sum() - weights)


def _repeated(control: Array, side: Columns) -> Array:
    return np.broadcast_to(control, (*control.shape[:2], len(side.samples)))
