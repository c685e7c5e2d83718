"""The Bayesian influence function: minus the covariance of losses over the local posterior.

    BIF(i, j) = d E[l_j] / d beta_i = - kappa Cov(l_i, l_j),      kappa = n_beta / n          (arXiv 2510.12071)

With a posterior set by ``window=W`` this predicts, in nats, the change of l_j after W training steps with one more unit
of weight on sample i.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.groups import Labels
from stagewise.influence.common_mode import controlled
from stagewise.influence.covariance import Centring
from stagewise.influence.pairs import Estimator, Kind, influence_matrix
from stagewise.influence.remainder import NoFirstOrderError, check_question, completed, omitted, remainder
from stagewise.influence.trusted import (
    DataSets,
    NoTrustedCheckpointError,
    Traces,
    as_traces,
    carried_labels,
    data_sets,
    joined,
    numbered,
    over_checkpoints,
)
from stagewise.traces.columns import Part
from stagewise.traces.stretches import stretches

__all__ = ["NoTrustedCheckpointError", "bif"]


def bif(
    traces: Traces | str | Path,
    *,
    train_groups: Labels | None = None,
    query_groups: Mapping[str, Labels | None] | None = None,
    grouped: bool = True,
    kind: Kind = "covariance",
    centring: Centring = "pooled",
    part: Part = "full",
    tokens: bool = False,
    self_pairs: bool = True,
    first_order: xr.Dataset | None = None,
    trusted_only: bool = True,
) -> xr.Dataset:
    """Influence of training samples, tokens or groups on queries at every checkpoint.

    Args:
        traces: loss traces, or the run folder that holds them.
        train_groups: label of every training sample ``(sample,)``, or with ``tokens`` of every token
            ``(sample, token)``.
        query_groups: the same by query name.
        grouped: where no labels are given here, take those that ``traces`` carries; a query set without labels is one
            group under its own name. Training samples without labels stay single samples.
        kind: ``"covariance"``: -kappa Cov, nats per unit weight; ``"correlation"``: -Corr, without unit;
            ``"partial"``: -Corr of what is left of every loss after regression on the mean loss of the *other* training
            samples, a mode in which all losses move together; see :mod:`stagewise.influence.common_mode`.
        centring: ``"pooled"``, ``"within"`` or ``"between"`` chains; see ``covariance_replicates``.
        part: ``"odd"`` or ``"even"`` under reflection about the checkpoint; the odd part has no curvature floor.
        tokens: one column per token, and the weight is that of a single token; otherwise a sample's loss is the
            weighted mean over its tokens.
        self_pairs: count a sample's effect on itself in the means of groups, as retraining does; False leaves out the
            pairs of a sample (or of two tokens of one sequence) with itself where a query set holds the candidates
            themselves, which share context and noise, unless a mean has no others.
        first_order: influence to first order, of the same posterior, steps and groups: only what lies beyond it is then
            taken from the draws, which must have been sampled with ``linear=True``. It is
            ``damped_influence(curvature="hessian")`` for chains, and ``response_influence(at="checkpoint")`` for
            ``sampler="window"``, whose reflected losses count as draws too. Steps at which it does not exist by its own
            attribute ``omitted`` are answered by the draws alone; ``first_order_omitted`` says which and why.
        trusted_only: leave out checkpoints whose chains cannot be trusted; attribute ``omitted`` says which and why.

    Returns:
        Dataset with ``value`` and ``stderr`` ``(step, train, query)``, the mean over pairs where there are groups (over
        a group of queries with the weights that the loss gives them). Below 2^21 numbers per checkpoint also
        ``replicates`` ``(step, replicate, train, query)``, over the
        chains that ended well at all checkpoints. Negative is helpful.

    Raises:
        NoTrustedCheckpointError: no checkpoint can be trusted, with the reasons.
        ValueError: labels do not fit the traces, an odd or even part is asked of traces without reflected losses, a
            partial correlation of a single training sample, or ``first_order`` of other draws, or of what is not a
            covariance.

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
        >>> traces = sw.TracesInMemory({0: tree})
        >>> influence = sw.bif(traces, train_groups=list("aabb"))
        >>> influence.value.dims, influence.value.shape, bool((influence.stderr > 0).all())
        (('step', 'train', 'query'), (1, 2, 1), True)
    """
    traces = as_traces(traces)
    if first_order is not None:
        check_question(kind, centring, part, self_pairs)
    labels = carried_labels(traces, train_groups, query_groups or {}, grouped)

    by_token = tokens or (labels[0] is not None and np.ndim(labels[0]) == 2)
    missing = {} if first_order is None else omitted(first_order)
    refused: dict[int, str] = {}

    def estimate(step: int, tree: xr.DataTree) -> xr.Dataset:
        if first_order is not None and step not in missing:
            sides = remainder(tree, labels, grouped, part, tokens)
            linear = data_sets(tree, labels, grouped, "linear", tokens, self_pairs)
            found, known = (_at_checkpoint(of, tree, kind, centring) for of in (sides, linear))
            try:
                return completed(found, known, first_order, tree.attrs, tokens)
            except NoFirstOrderError as error:
                refused.update(error.steps)
                return found
        sides = data_sets(tree, labels, grouped, part, tokens, self_pairs)
        return _at_checkpoint(controlled(sides, tree, part) if kind == "partial" else sides, tree, kind, centring)

    stacked = over_checkpoints(traces, traces.steps, trusted_only, estimate)
    if refused:
        raise NoFirstOrderError(refused)
    units = "nats per unit weight" if kind == "covariance" else "1"
    answered = stacked["step"].values.tolist()
    used = first_order is not None and any(step not in missing for step in answered)
    stacked.attrs |= {
        "estimator": "bif",
        "kind": kind,
        "centring": centring,
        "part": part,
        "tokens": tokens,
        "self_pairs": self_pairs,
        "first_order": first_order.attrs["estimator"] if first_order is not None and used else "sampled",
        "first_order_omitted": json.dumps({step: missing[step] for step in answered if step in missing}),
        "units": units,
        "sign": "negative = helpful: more weight on the training data lowers the query loss",
    }
    if by_token:
        stacked.attrs["member"] = "token"
    for variable in stacked.data_vars.values():
        variable.attrs["units"] = units
    return stacked


def _at_checkpoint(sides: DataSets, tree: xr.DataTree, kind: Kind, centring: Centring) -> xr.Dataset:
    """The influence matrix of one checkpoint."""
    # By all chains, failed or not, so that replicates are cut alike at every checkpoint.
    pieces = stretches(tree["chains"].sizes["chain"], tree["train"].sizes["draw"])
    estimator = Estimator(kind, centring, -sides.weight if kind == "covariance" else -1.0, pieces)
    matrices = [influence_matrix(sides.train, query, estimator, shared) for query, shared in sides.queries]
    return joined([numbered(matrix, tree) for matrix in matrices], "query")
