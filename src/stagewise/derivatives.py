"""Derivatives of a task's losses at a point: gradients of means, along directions, products with curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from stagewise.attention import plain_attention
from stagewise.data import Batch, Samples
from stagewise.differentiate import differentiable, gradient, pull, push
from stagewise.evaluate import Point, chunks, sample_weights
from stagewise.groups import TRAIN, Groups
from stagewise.memory import out_of_memory
from stagewise.slopes import relative_step, weighted_slope
from stagewise.twice import once_only

_GRADIENTS_AT_ONCE = 64

Product = Callable[[Tensor], Tensor]
"""Vectors ``(k, parameters)`` to their images."""


def mean_gradient(
    point: Point, u: Tensor, data: Samples, rows: Tensor | None = None, query: str | None = None
) -> Tensor:
    """Gradient of the weighted mean loss of some samples, default all: ``(parameters,)``.

    Raises:
        ValueError: it is not finite although the losses are, with the sample.
    """
    if point.task.pure.in_place:
        total, weight = weighted_slope(point, u, data, rows, query)
    else:
        total, weight = torch.zeros_like(u), 0.0
        for batch in chunks(point.task, data, rows):
            with differentiable(u) as leaf:
                losses, weights = point.sample_losses(leaf, batch, query)
                total += gradient((weights * losses).sum(), leaf)
            weight += float(weights.sum())
    if point.task.ranks.total((~torch.isfinite(total)).sum()):
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
    if task.pure.in_place:
        masks = ((places[rows] == number).float() for number in mine)
        found = [weighted_slope(point, u, data, rows, query, mask) for mask in masks]
        return [slope / max(weight, 1e-30) for slope, weight in found]
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
            return torch.stack([bend(point, u, v, rows) for v in vectors])

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


def bend(point: Point, u: Tensor, v: Tensor, rows: Tensor | None, length: float = 1.0) -> Tensor:
    """H v by central differences, over a step of this length in units of the usual."""
    step = length * difference_step(point, u, v)
    if step == 0:
        return torch.zeros_like(v)
    ahead, behind = (mean_gradient(point, u + sign * step * v, point.task.train, rows) for sign in (1, -1))
    change: Tensor = (ahead - behind) / (2 * step)
    return change


def difference_step(point: Point, u: Tensor, v: Tensor) -> float:
    """How far along ``v`` central differences reach: the weights change as much as rounding asks for; 0 if v is 0."""
    moved, place = v if point.scale is None else point.scale * v, u if point.anchor is None else point.anchor
    if point.task.pure.in_place:
        return relative_step(point, place, moved)
    change = float(moved.norm())
    if change == 0:
        return 0.0
    return float(torch.finfo(u.dtype).eps ** (1 / 3) * max(1.0, float(place.norm())) / change)


def dense(product: Product, like: Tensor, rows: int = 128) -> Tensor:
    """The symmetric matrix behind a product, ``(parameters, parameters)``, a few of its rows at a time."""
    identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
    matrix = torch.cat([product(piece) for piece in torch.split(identity, rows)])
    return (matrix + matrix.mT) / 2


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
