"""A task at a point of its parameters: losses, gradients of means, products with curvature.

All derivatives are reverse mode through ordinary autograd, as training is: what is hidden from ``backward()`` there is
hidden here. Several vectors or several places are evaluated stacked (``vmap``) where the model allows it, one by one
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import one_hot, pad

from stagewise.attention import plain_attention, slow_path
from stagewise.check import check
from stagewise.checkpoint import Checkpoint
from stagewise.data import Batch, Samples
from stagewise.groups import TRAIN, Groups
from stagewise.memory import out_of_memory
from stagewise.task import Losses, Task
from stagewise.twice import once_only
from stagewise.vector import ParameterVector

Batching = Literal["stacked", "loop"]
"""Several places in one ``torch.func.vmap``, or one by one: for models that vmap cannot trace or that are large."""

CURVATURE_SAMPLES = 2048
"""Enough samples to see the spectrum; a larger training set is represented by this many of them."""

_PRODUCT_COST = 2**36
"""Parameters times losses behind one product with the curvature, of models so large that fewer samples must do."""

_FEWEST = 8
_GRADIENTS_AT_ONCE = 64

in_any_mode = torch.inference_mode(False)
"""Decorates what users call: what it computes must be differentiable, whatever mode the caller is in."""

Product = Callable[[Tensor], Tensor]
"""Vectors ``(k, parameters)`` to their images."""


@dataclass(frozen=True, eq=False)
class Point:
    """A task as a function of a vector u of the parameters that move.

    Attributes:
        task: the task.
        vector: which parameters move.
        state: all parameters and buffers by name, on the task's device; those that do not move are taken from here.
        anchor: where u = 0 lies ``(parameters,)``; None: u holds the parameters themselves.
        scale: length of a unit of u along each parameter ``(parameters,)``; None: 1.
    """

    task: Task
    vector: ParameterVector
    state: Mapping[str, Tensor]
    anchor: Tensor | None = None
    scale: Tensor | None = None

    def params(self, u: Tensor) -> dict[str, Tensor]:
        """All parameters and buffers at one place ``(parameters,)``."""
        moved = u if self.scale is None else self.scale * u
        moved = moved if self.anchor is None else self.anchor + moved
        return {**self.state, **self.vector.unflatten(moved)}

    def losses(self, u: Tensor, batch: Batch, query: str | None = None) -> Losses:
        """Losses of a batch at one place, in nats, and their weights."""
        return self.task.weighted_losses(self.params(u), batch, query)

    def sample_losses(self, u: Tensor, batch: Batch, query: str | None = None) -> tuple[Tensor, Tensor]:
        """Loss and weight of every sample of a batch at one place, ``(batch,)`` each."""
        return self.task.by_sample(self.losses(u, batch, query))

    def grouped_losses(
        self, u: Tensor, batch: Batch, query: str | None = None, tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """What groups are means of: loss and weight of every sample ``(batch,)``, or token ``(batch * tokens,)``.

        Args:
            u: the place.
            batch: the samples.
            query: whose loss is measured; default the training loss.
            tokens: how many a sample has, where groups are of tokens. A batch that was padded less has the first.

        Raises:
            ValueError: the loss has no tokens, or more.
        """
        if not tokens:
            return self.sample_losses(u, batch, query)
        losses = self.losses(u, batch, query)
        if losses.values.ndim == 1 or losses.values.shape[1] > tokens:
            got = "one loss per sample" if losses.values.ndim == 1 else f"{losses.values.shape[1]} tokens"
            raise ValueError(f"groups are of {tokens} tokens in a sample, but the loss returned {got}")
        missing = (0, tokens - losses.values.shape[1])
        values, weights = pad(losses.values, missing), pad(self.task.shares(losses), missing)
        return values.flatten(), weights.flatten()


def at(
    task: Task, checkpoint: Checkpoint, parameters: Sequence[str] = (".*",), *, curvature: bool = False
) -> tuple[Point, Checkpoint]:
    """The door through which every room enters: a checked task at a checked checkpoint.

    Args:
        task: the task.
        checkpoint: as it was recorded.
        parameters: regular expressions; of the parameters that the optimiser updates, those that match one move.
        curvature: whether second derivatives will be used.

    Returns:
        The point, u being the parameters themselves, and the checkpoint under the model's own names.

    Raises:
        CheckpointError: the checkpoint is of another model.
        ValueError: the losses are unusable, see :func:`stagewise.check.check`.
    """
    fitted = task.fitted(checkpoint)
    check(task, fitted, curvature=curvature)
    updated = fitted.optimizer.updated if fitted.optimizer else None
    return Point(task, ParameterVector.of(task, parameters, updated), fitted.params), fitted


def spread_rows(count: int, n: int) -> Tensor:
    """``count`` of ``n`` samples, evenly spaced: data sets are often sorted, by class for instance."""
    count = min(count, n)
    return torch.arange(count) * n // count


def represented(point: Point) -> Tensor:
    """Training samples that stand for all of them: at most 2048, and of large models as many as can be paid for."""
    task = point.task
    with torch.no_grad():
        values = task.losses(point.state, task.train.batch(slice(0, 1), task.device))
    affordable = _PRODUCT_COST // (values.numel() * point.vector.size)
    return spread_rows(min(CURVATURE_SAMPLES, max(_FEWEST, affordable)), len(task.train))


def chunks(task: Task, data: Samples, rows: Tensor | None = None) -> Iterator[Batch]:
    """The samples ``rows`` of a data set, default all, in batches that fit in memory."""
    rows = torch.arange(len(data)) if rows is None else rows
    return (data.batch(piece, task.device) for piece in torch.split(rows, task.forward_batch))


def sample_weights(point: Point) -> Tensor:
    """The weight a_i of every training sample in the objective ``(n,)``, float64. It depends on the data alone."""
    task = point.task
    if task.sample_weights is None:
        weights = _uniform_weights(point)
        if weights is None:
            with torch.no_grad():
                parts = [task.sample_losses(point.state, batch)[1].cpu() for batch in chunks(task, task.train)]
            weights = torch.cat(parts).double()
        task.sample_weights = weights
    return task.sample_weights


def _uniform_weights(point: Point) -> Tensor | None:
    """Weights of 1, where one sample is enough to know that all have it."""
    task = point.task
    with torch.no_grad():
        values, weights = task.weighted_losses(point.state, task.train.batch(slice(0, 1), task.device))
    known = weights is None and (values.ndim == 1 or task.objective == "samples")
    return torch.ones(len(task.train), dtype=torch.float64) if known else None


def mean_gradient(
    point: Point, u: Tensor, data: Samples, rows: Tensor | None = None, query: str | None = None
) -> Tensor:
    """Gradient of the weighted mean loss of some samples, default all: ``(parameters,)``.

    Raises:
        ValueError: it is not finite although the losses are, with the sample.
    """
    total, weight = torch.zeros_like(u), 0.0
    for batch in chunks(point.task, data, rows):
        with differentiable(u) as leaf:
            losses, weights = point.sample_losses(leaf, batch, query)
            total += gradient((weights * losses).sum(), leaf)
        weight += float(weights.sum())
    if not torch.isfinite(total).all():
        rows = torch.arange(len(data)) if rows is None else rows
        if len(rows) > 1:
            for row in rows:
                mean_gradient(point, u, data, row[None], query)
        raise ValueError(
            f"{data.name}: the loss of sample {int(rows[0])} is finite, but its gradient is not; look for 0 * inf, a "
            "root or a norm at 0, or torch.where over what is not a number"
        )
    return total / weight if weight else total


def group_gradients(point: Point, u: Tensor, groups: Groups) -> Tensor:
    """Gradient of the mean loss of every group of queries, or of n times the objective by the weight of one member.

    With equal weights the latter is the mean gradient of the group's samples (or tokens) too; else each counts with
    a_i / mean(a).

    Returns:
        ``(group, parameters)``.
    """
    by_token = {dataset: iter(_token_gradients(point, u, groups, dataset)) for dataset in groups.widths}
    return torch.stack(
        [
            next(by_token[dataset]) if dataset in by_token else _sample_gradient(point, u, dataset, index)
            for dataset, index in zip(groups.datasets, groups.indices, strict=True)
        ]
    )


def _sample_gradient(point: Point, u: Tensor, dataset: str, index: Tensor) -> Tensor:
    """Of one group of samples."""
    task = point.task
    if dataset != TRAIN:
        return mean_gradient(point, u, task.queries[dataset], index, dataset)
    weights = sample_weights(point)
    return float(weights[index].mean() / weights.mean()) * mean_gradient(point, u, task.train, index)


def _token_gradients(point: Point, u: Tensor, groups: Groups, dataset: str) -> list[Tensor]:
    """Of all groups of tokens in a data set, in their order: samples hold tokens of many groups, so each is met once.

    Raises:
        ValueError: as :func:`mean_gradient`.
    """
    task, query = point.task, None if dataset == TRAIN else dataset
    data, tokens = task.train if query is None else task.queries[query], groups.widths[dataset]
    places = groups.places(len(data), dataset)
    mine = [number for number, where in enumerate(groups.datasets) if where == dataset]
    rows = (places < len(groups)).any(1).nonzero().flatten()
    sums, weight = [torch.zeros_like(u) for _ in mine], torch.zeros(len(groups) + 1, dtype=torch.float64)
    for piece in torch.split(rows, task.forward_batch):
        where = places[piece].flatten()
        with differentiable(u) as leaf:
            losses, weights = point.grouped_losses(leaf, data.batch(piece, task.device), query, tokens)
            by_group = losses.new_zeros(len(groups) + 1).index_add(0, where.to(losses.device), weights * losses)
            if by_group.requires_grad:
                for total, number in zip(sums, mine, strict=True):
                    total += torch.autograd.grad(by_group[number], leaf, retain_graph=True)[0]
        weight.index_add_(0, where, weights.detach().cpu().double())
    if not all(torch.isfinite(total).all() for total in sums):
        mean_gradient(point, u, data, query=query)  # says of which sample the gradient is not finite
    if query is None:
        sizes = [groups.sizes[number] * float(sample_weights(point).mean()) for number in mine]
    else:
        sizes = weight[mine].clamp(min=1e-30).tolist()
    return [total / size for total, size in zip(sums, sizes, strict=True)]


def directional_derivatives(
    point: Point, u: Tensor, directions: Tensor, data: Samples, query: str | None = None, tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Derivative of the loss of every sample, or token, along each direction ``(direction, parameters)``.

    Args:
        point: the task.
        u: where.
        directions: along what.
        data: whose losses.
        query: which loss; default the training loss.
        tokens: as for :meth:`Point.grouped_losses`.

    Returns:
        The derivatives ``(direction, sample)`` or ``(direction, sample * tokens)``, and the weights of the losses
        ``(sample,)`` or ``(sample * tokens,)``; float64, on the CPU.

    Raises:
        ValueError: as :func:`mean_gradient`.
    """
    scores, shares = [], []
    for batch in chunks(point.task, data):
        with plain_attention(), differentiable(u) as leaf:
            losses, weights = point.grouped_losses(leaf, batch, query, tokens)
            scores.append(_along(losses, leaf, directions).cpu().double())
            shares.append(weights.detach().cpu().double())
        if not torch.isfinite(scores[-1]).all():
            mean_gradient(point, u, data, query=query)  # says of which sample the gradient is not finite
    return torch.cat(scores, 1), torch.cat(shares)


def _along(losses: Tensor, leaf: Tensor, directions: Tensor) -> Tensor:
    """One product for all samples; their gradients one by one where backward() cannot itself be differentiated.

    Some operations say so (``functional.embedding_bag``), others give 0 (a ``Function`` that detaches what it gets in
    backward): so a few samples are always done both ways.
    """

    def by_gradients(rows: Tensor) -> Tensor:
        pieces = (one_hot(piece, len(losses)).to(losses) for piece in torch.split(rows, _GRADIENTS_AT_ONCE))
        return torch.cat([directions @ pull([losses], [leaf], [piece])[0].mT for piece in pieces], 1)

    few = torch.arange(min(2, len(losses)))
    try:
        along = push([losses], leaf, directions)[0]
    except RuntimeError as error:
        if out_of_memory(error):
            raise
    else:
        expected = by_gradients(few)
        if (along[:, few] - expected).norm() <= 1e-2 * expected.norm():
            return along
    return by_gradients(torch.arange(len(losses)))


def hessian_product(point: Point, u: Tensor, rows: Tensor | None = None) -> Product:
    """Vectors ``(k, parameters)`` to H v, for the objective on some training samples, default all.

    Where an operation has no second derivative (``torch.cdist``, CTC), by differences of gradients.
    """

    def product(vectors: Tensor) -> Tensor:
        try:
            return exact(vectors)
        except RuntimeError as error:
            if not once_only(error):
                raise
            return torch.stack([_bend(point, u, v, rows) for v in vectors])

    def exact(vectors: Tensor) -> Tensor:
        image, weight = torch.zeros_like(vectors), 0.0
        for batch in chunks(point.task, point.task.train, rows):
            part, weights = _curved(point, u, vectors, batch)
            image += part
            weight += float(weights.sum())
        return image.div_(weight)

    return product


def _curved(point: Point, u: Tensor, vectors: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Products of the curvature of a batch's weighted sum of losses, and its weights."""
    with plain_attention():
        if len(vectors) > 1:
            with differentiable(u) as leaf:
                losses, weights = point.sample_losses(leaf, batch)
                slope = gradient((weights * losses).sum(), leaf, create_graph=True)
                return pull([slope], [leaf], [vectors])[0], weights
        with _leaves(point, u) as (params, leaves):  # fewer copies of a large model
            losses, weights = point.task.sample_losses(params, batch)
            total, along = (weights * losses).sum(), point.vector.unflatten(_scaled(point, vectors[0]))
            if not total.requires_grad:
                return torch.zeros_like(vectors), weights
            slopes = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
            live = [(slope, side) for slope, side in zip(slopes, along.values(), strict=True) if slope.requires_grad]
            if not live:
                return torch.zeros_like(vectors), weights
            kept, sides = zip(*live, strict=True)
            del slopes, live
            bends = torch.autograd.grad(kept, leaves, sides, allow_unused=True, materialize_grads=True)
    return _joined(point, u, bends)[None], weights


def _bend(point: Point, u: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
    """H v by central differences, over a step by which the weights change as much as rounding asks for."""
    change = float((v if point.scale is None else point.scale * v).norm())
    if change == 0:
        return torch.zeros_like(v)
    size = float((u if point.anchor is None else point.anchor).norm())
    step = torch.finfo(u.dtype).eps ** (1 / 3) * max(1.0, size) / change
    ahead, behind = (mean_gradient(point, u + sign * step * v, point.task.train, rows) for sign in (1, -1))
    bend: Tensor = (ahead - behind) / (2 * step)
    return bend


def dense(product: Product, like: Tensor, rows: int = 128) -> Tensor:
    """The symmetric matrix behind a product, ``(parameters, parameters)``, a few of its rows at a time."""
    identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
    matrix = torch.cat([product(piece) for piece in torch.split(identity, rows)])
    return (matrix + matrix.mT) / 2


def over_rows(function: Callable[[Tensor], Tensor], rows: Tensor | Sequence[Tensor], batching: Batching) -> Tensor:
    """``function`` of every row of ``rows (k, parameters)``: ``(k, ...)``."""
    if batching == "stacked" and isinstance(rows, Tensor) and len(rows) > 1:
        stacked: Tensor = vmap(function)(rows)
        return stacked
    return torch.stack([function(row) for row in rows])


@contextmanager
def differentiable(u: Tensor) -> Iterator[Tensor]:
    """A leaf at ``u``, in a context in which what is computed from it can be differentiated, whatever the caller's."""
    with slow_path(), torch.inference_mode(False), torch.enable_grad():
        yield (u.clone() if u.is_inference() else u.detach()).requires_grad_()


def slope_at(point: Point, u: Tensor, values: Sequence[Callable[[Mapping[str, Tensor]], Tensor]]) -> Tensor:
    """Gradient at one place ``(parameters,)`` of a sum of numbers that are computed from the parameters and buffers.

    As through a leaf ``u``, with fewer vectors of its length in memory, and what one number needs for its backward pass
    is gone before the next: for large models that is what counts.
    """
    slopes: list[Tensor] = []
    with slow_path(), _leaves(point, u) as (params, leaves):
        for value in values:
            if (found := value(params)).requires_grad:
                more = list(torch.autograd.grad(found, leaves, allow_unused=True, materialize_grads=True))
                for place in range(len(slopes)):
                    more[place] = slopes[place] + more[place]
                slopes = more
    del params, leaves
    return _joined(point, u, slopes) if slopes else torch.zeros_like(u)


@contextmanager
def _leaves(point: Point, u: Tensor) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
    """All parameters and buffers at one place, and those that move, to differentiate by."""
    with torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad():
            params = point.params(u)
        leaves = {name: params[name].detach().requires_grad_() for name in point.vector.names}
        params.update(leaves)
        yield params, list(leaves.values())


def _scaled(point: Point, vector: Tensor) -> Tensor:
    return vector if point.scale is None else point.scale * vector


def _joined(point: Point, u: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """Derivatives by the parameters as one by ``u``."""
    vector = torch.cat([slope.to(u.dtype).reshape(-1) for slope in slopes])
    return vector if point.scale is None else vector.mul_(point.scale)


def gradient(value: Tensor, leaf: Tensor, create_graph: bool = False) -> Tensor:
    """Gradient of a number; zero where it does not depend on the leaf."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    found = torch.autograd.grad(value, leaf, create_graph=create_graph, allow_unused=True)[0]
    return torch.zeros_like(leaf) if found is None else found


def pull(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool = True
) -> list[Tensor]:
    """Transposed Jacobian times k cotangents ``(k, *output)``: for every input ``(k, *input)``.

    All k share one backward pass where every operation can be batched. The graph is kept; without ``keep`` a single
    cotangent frees it on the way.
    """
    count = len(cotangents[0])
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not live:
        return [i.new_zeros(count, *i.shape) for i in inputs]
    kept = [o for o, _ in live]

    def backward(sides: Sequence[Tensor], batched: bool) -> list[Tensor]:
        held = keep or count > 1
        found = torch.autograd.grad(kept, inputs, sides, retain_graph=held, allow_unused=True, is_grads_batched=batched)
        lead = (count,) if batched else ()
        return [i.new_zeros(*lead, *i.shape) if f is None else f for f, i in zip(found, inputs, strict=True)]

    if count == 1:  # nothing to share, and what vmap keeps is not freed at once
        return [found[None] for found in backward([c[0] for _, c in live], False)]
    try:
        return backward([c for _, c in live], True)
    except RuntimeError as error:  # an operation without a batching rule
        if out_of_memory(error):
            raise
        single = [backward([c[k] for _, c in live], False) for k in range(count)]
        return [torch.stack(parts) for parts in zip(*single, strict=True)]


def push(outputs: Sequence[Tensor], leaf: Tensor, directions: Tensor) -> list[Tensor]:
    """Jacobian times k directions ``(k, parameters)``: for every output ``(k, *output)``.

    The product with the transposed Jacobian is linear in the cotangent, so that its own transpose is the Jacobian:
    reverse mode is all it takes, for every operation that can be differentiated twice.
    """
    probes = [torch.zeros_like(o, requires_grad=True) for o in outputs]
    live = [(o, p) for o, p in zip(outputs, probes, strict=True) if o.requires_grad]
    if not live:
        return [o.new_zeros(len(directions), *o.shape) for o in outputs]
    linear = torch.autograd.grad([o for o, _ in live], leaf, [p for _, p in live], create_graph=True)[0]
    return pull([linear], probes, [directions])
