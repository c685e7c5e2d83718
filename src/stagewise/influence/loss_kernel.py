"""The loss kernel: how alike samples are to the model, as the correlation of their losses over the local posterior.

    R(i, j) = Corr(l_i, l_j)                                                                    (arXiv 2509.26537)

It is the influence of the training samples on themselves, of the other sign and without unit, from the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stagewise.groups import Labels
from stagewise.influence.covariance import Centring, group_sums
from stagewise.influence.pairs import Estimator, influence_matrix
from stagewise.influence.trusted import Traces, as_traces, carried_labels, numbered, ok_chains, over_checkpoints
from stagewise.labels import as_labels
from stagewise.traces.columns import Columns, Part, columns
from stagewise.traces.stretches import stretches


def loss_kernel(
    traces: Traces | str | Path,
    *,
    groups: Labels | None = None,
    grouped: bool = False,
    tokens: bool = False,
    steps: Sequence[int] | None = None,
    part: Part = "full",
    centring: Centring = "pooled",
    trusted_only: bool = True,
) -> xr.Dataset:
    """Correlation of the losses of training samples, of their tokens or of groups, at every checkpoint.

    Positive where the losses rise and fall together: what helps one helps the other. Noise of the draws is about
    (1 - R^2) / sqrt(effective draws) in every entry, so that small correlations of a few chains mean nothing.

    Args:
        traces: loss traces, or the run folder that holds them.
        groups: label of every training sample ``(sample,)`` or token ``(sample, token)``; the kernel is then that of
            the groups' mean losses.
        grouped: by the labels that the traces carry, where none are given here.
        tokens: one row per token.
        steps: some of the checkpoints; default all.
        part: ``"odd"`` or ``"even"`` under reflection about the checkpoint.
        centring: ``"pooled"``, ``"within"`` or ``"between"`` chains; see ``covariance_replicates``.
        trusted_only: leave out checkpoints whose chains cannot be trusted; attribute ``omitted`` says which and why.

    Returns:
        Dataset with ``value`` and ``stderr`` ``(step, sample, other)``, symmetric, without unit, 1 on the diagonal (a
        loss that never changes has 0 with all, itself too); below 2^21 numbers per checkpoint also ``replicates``
        ``(step, replicate, sample, other)``, over the chains that ended well at all checkpoints. Samples are called by
        their number, tokens ``"sample/token"``, groups by their label; ``label (sample)`` has the labels of samples
        that the traces carry.

    Raises:
        NoTrustedCheckpointError: no checkpoint can be trusted, with the reasons.
        ValueError: labels do not fit the traces, steps are not among them, or an odd or even part is asked of traces
            without reflected losses.

    Example:
        >>> import torch, stagewise as sw
        >>> from stagewise.sampling.chains import sample_block
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> tree = sample_block(task, start, sw.LocalPosterior(window=10), sw.Chains(chains=8, draws=64))
        >>> kernel = sw.loss_kernel(sw.TracesInMemory({0: tree}))
        >>> kernel.value.dims, kernel.value.values[0].diagonal().round(6)
        (('step', 'sample', 'other'), array([1., 1., 1., 1.]))
    """
    traces = as_traces(traces)
    chosen = list(traces.steps) if steps is None else list(steps)
    if missing := sorted(set(chosen) - set(traces.steps)):
        raise ValueError(f"steps {missing} are not in the traces, which have {list(traces.steps)}")
    carried = None if groups is not None else carried_labels(traces, None, {}, grouped=True)[0]
    if grouped and carried is not None:
        groups, carried = carried, None

    def estimate(_step: int, tree: xr.DataTree) -> xr.Dataset:
        dataset = tree["train"].to_dataset()
        rows = _summed(columns(dataset, ok_chains(tree), groups, "groups", part=part, tokens=tokens))
        # By all chains, failed or not, so that replicates are cut alike at every checkpoint.
        pieces = stretches(tree["chains"].sizes["chain"], dataset.sizes["draw"])
        matrix = influence_matrix(rows, rows, Estimator("correlation", centring, 1.0, pieces), shared=False)
        found = numbered(matrix, tree).drop_vars(["train_size", "query_size"]).rename(train="sample", query="other")
        labels = _of_samples(carried, rows, dataset)
        return found if labels is None else found.assign_coords(label=("sample", labels))

    result = over_checkpoints(traces, chosen, trusted_only, estimate)
    result.attrs |= {"estimator": "loss kernel", "centring": centring, "part": part, "units": "1"}
    for variable in result.data_vars.values():
        variable.attrs["units"] = "1"
    return result


def _summed(rows: Columns) -> Columns:
    """The loss of every row in place of those of its columns."""
    if rows.rows is None:
        return rows
    summed = group_sums(rows.traces, rows.rows)
    return replace(rows, traces=summed, samples=np.arange(len(rows.names)), rows=None, counts=None)


def _of_samples(labels: Labels | None, rows: Columns, dataset: xr.Dataset) -> np.ndarray[Any, np.dtype[np.str_]] | None:
    """The label of the sample that each row is of, where samples have labels."""
    if labels is None or np.ndim(labels) != 1:
        return None
    words, numbers = as_labels(labels, len(labels), "labels"), dataset["sample"].values
    return words[numbers[rows.samples] if len(words) > len(numbers) else rows.samples]
