"""Exact influence of data that need not be in the window's batches: what they would do at the rate they are drawn.

In an update, weight on sample i changes the gradient by a_i grad l_i / sum_k a_k over its batch, if it is in it. Of
all batches it is in a share of B/n, so that weight in every update has in expectation the influence

    sum_t  a_i <grad l_i(w_t), lam_g(t)>  /  sum over all training samples of a_k,

lam_g(t) the derivative of the query by the gradient of update t. Along the way this is smooth, so a few updates do.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from stagewise.derivatives import directional_derivatives, group_gradients
from stagewise.groups import Groups
from stagewise.labelled import Array
from stagewise.retraining.adjoint import Adjoint, Replay, step_back

_NODES = 9


def expected_sums(replay: Replay, trained: Groups, queried: Groups) -> tuple[Array, Array]:
    """Expected derivatives ``(train, query)`` by the weight of each group, and the error of taking few updates."""
    size = replay.at_once
    stacks = (queried.chosen(slice(first, first + size)) for first in range(0, len(queried), size))
    parts = [_of_queries(replay, trained, stack) for stack in stacks]
    value, error = (torch.cat(columns, 1).numpy() for columns in zip(*parts, strict=True))
    return value, error


def _of_queries(replay: Replay, trained: Groups, queried: Groups) -> tuple[Tensor, Tensor]:
    task, states = replay.start.task, replay.states()
    adjoint = Adjoint.of(group_gradients(replay.start.point, next(states)[1].params[0], queried))
    places = trained.places(len(task.train)).flatten()
    fine, coarse = _weights(replay.span, 1), _weights(replay.span, 2)
    sums = torch.zeros(2, len(queried), len(places), dtype=torch.float64)
    for step, state in states:
        along = step_back(replay, state, step, adjoint).by_gradient
        if step in fine:
            found, weights = directional_derivatives(
                replay.start.point, state.params[0], along, task.train, tokens=trained.tokens
            )
            by_weight = torch.tensor([fine[step], coarse.get(step, 0.0)])[:, None, None]
            sums += by_weight * found * (weights / weights.sum())
    by_group = torch.zeros(2, len(queried), len(trained) + 1, dtype=torch.float64).index_add_(2, places, sums)
    value, fewer = by_group[..., :-1].mT
    return value, (value - fewer).abs()


def _weights(span: range, every: int) -> dict[int, float]:
    """The sum over all updates as one over a few of them, by a cubic spline through these: weight by step."""
    nodes = np.unique(np.linspace(span.start, span.stop - 1, min(_NODES, len(span))).round().astype(int))
    nodes = np.unique([*nodes[::every], nodes[-1]])
    if len(nodes) == 1:
        return {int(nodes[0]): float(len(span))}
    sums = CubicSpline(nodes, np.eye(len(nodes)))(np.array(span)).sum(0)
    return {int(node): float(total) for node, total in zip(nodes, sums, strict=True)}
