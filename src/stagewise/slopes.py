"""Gradients of sums of numbers that are computed from the parameters: with few vectors in memory, or in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stagewise.attention import slow_path
from stagewise.data import Batch, Samples
from stagewise.evaluate import Point
from stagewise.functional import Value
from stagewise.task import Params


def slope_at(point: Point, u: Tensor, values: Sequence[Value]) -> Tensor:
    """Gradient at one place ``(parameters,)`` of a sum of numbers that are computed from the parameters and buffers.

    As through a leaf ``u``, with fewer vectors of its length in memory, and what one number needs for its backward pass
    is gone before the next: for large models that is what counts. Of a model that several processes hold, numbers are
    those of this process's samples, and the gradient is that of the sum over all of them by the rows that are here.
    """
    with slow_path(), torch.inference_mode(False), torch.enable_grad():
        with torch.no_grad():
            params = point.params(u)
        slope = torch.zeros_like(u)
        parts = point.vector.unflatten(slope)
        point.task.pure.add_slopes(params, values, parts)
    if len(set(point.vector.dtypes)) > 1:  # the parts are no views
        slope = point.vector.flatten(parts, like=u)
    return slope if point.scale is None else slope.mul_(point.scale)


def weighted_slope(
    point: Point,
    u: Tensor,
    data: Samples,
    rows: Tensor | None = None,
    query: str | None = None,
    signs: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Gradient of the weighted sum of the losses of some samples, default all, and the sum of their weights.

    Batches are divided among the processes that hold the model.

    Args:
        point: the task.
        u: where.
        data: whose losses.
        rows: which samples.
        query: which loss; default the training loss.
        signs: by what the loss of each sample ``(rows,)``, or of each token ``(rows, tokens)``, is multiplied.
    """
    task, ranks = point.task, point.task.ranks
    rows = torch.arange(len(data)) if rows is None else rows
    signs = torch.ones(len(rows)) if signs is None else signs
    places, weight = ranks.parts(torch.arange(len(rows)), task.forward_batch), [0.0]

    def value(batch: Batch, own: Tensor) -> Value:
        def of(params: Params) -> Tensor:
            found = task.weighted_losses(params, batch, query)
            by_token = own.ndim == 2
            losses, weights = (found.values, task.shares(found)) if by_token else task.by_sample(found)
            weights = (own[:, : losses.shape[1]] if by_token else own).to(losses) * weights[: len(own)]
            weight[0] += float(weights.sum())
            return (weights * losses[: len(own)]).sum()

        return of

    slope = slope_at(
        point, u, [value(data.batch(rows[part], task.device), signs[part[:count]]) for part, count in places]
    )
    return slope, float(ranks.over_samples(torch.full((), weight[0], dtype=torch.float64, device=u.device)))


def relative_step(point: Point, place: Tensor, moved: Tensor) -> float:
    """How far along a change of the weights differences reach, so that none changes by more than rounding asks for.

    Relative to the size of each parameter: those of an embedding may be a hundred times smaller than those of a norm.

    Args:
        point: the task.
        place: the weights ``(parameters,)``.
        moved: their change by a step of 1 ``(parameters,)``; of 0 the step is 0.
    """
    names, entries = point.vector.names, point.task.pure.entries
    pairs = [point.vector.unflatten(vector) for vector in (moved, place)]
    squares = torch.stack([torch.stack([each[name].double().square().sum() for name in names]) for each in pairs])
    changes, sizes = point.task.ranks.total(squares).sqrt().cpu()
    few = 0.01 * torch.tensor([entries(name) for name in names], dtype=torch.float64).sqrt()  # of those that are 0
    most = float((changes / (sizes + few)).max())
    return float(torch.finfo(place.dtype).eps ** (1 / 3) / most) if most else 0.0
