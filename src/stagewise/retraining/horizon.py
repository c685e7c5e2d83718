"""How far back a derivative of training can be trusted: it is held against training with slightly changed weights.

Where training is unstable, small changes grow until they are no longer small: the derivative is then exact and says
nothing, or it is rounding. A finite change of weight tells, for all groups and queries at once: in each bin every group
goes up or down at random, and comes back reversed, so that the difference is free of second order. There are two sizes
of change: the smaller is nearer to a derivative, the larger is seen where the influence is near the rounding of losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr
from torch import Tensor

from stagewise.groups import Groups
from stagewise.retraining.adjoint import Replay
from stagewise.retraining.losses import losses_along
from stagewise.retraining.schedule import Change, Schedule

CHANGES = (0.01, 0.1)
"""By how much the weights are changed."""

MOST = 0.1
"""Relative error beyond which a derivative is not given."""


def masked(
    influence: xr.Dataset, slopes: Tensor, replay: Replay, trained: Groups, spans: Sequence[range]
) -> xr.Dataset:
    """Influence in two times, NaN where its derivative misses what retraining measures.

    Args:
        influence: ``value`` ``(trained, asked, train, query)``.
        slopes: the same by the weight of whole groups.
        replay: the run.
        trained: the groups.
        spans: the updates of every bin.

    Returns:
        With ``miss`` ``(trained, asked)``, relative errors over the queries, and the attribute ``masked``.
    """
    miss = misses(slopes, replay, trained, spans, influence["asked"].values.tolist())
    failed = miss > MOST
    kept = xr.DataArray(~failed.numpy(), dims=("trained", "asked"))
    sizes = " or ".join(f"{change:.0%}" for change in CHANGES)
    told = (
        f"{int(failed.sum())} of {int((~miss.isnan()).sum())} pairs (trained, asked) are NaN: there the derivative "
        f"misses by more than {MOST:.0%} what retraining measures with weights changed by {sizes}; training carries "
        "such changes beyond first order, or beyond rounding"
    )
    attrs = {**influence.attrs, "masked": told if failed.any() else ""}
    about = {"of": f"the derivative against retraining with weights changed by {sizes}"}
    found = influence.assign(value=influence["value"].where(kept), miss=(("trained", "asked"), miss.numpy(), about))
    return found.assign_attrs(attrs)


def misses(
    slopes: Tensor,
    replay: Replay,
    trained: Groups,
    spans: Sequence[range],
    asked: Sequence[int],
    queries: Sequence[int] | None = None,
) -> Tensor:
    """Relative error of the derivative along a random direction of weights in each bin, over the queries.

    Args:
        slopes: the derivatives by the weight of whole groups ``(trained, asked, train, query)``, float64.
        replay: the run.
        trained: the groups.
        spans: the updates of every bin.
        asked: the steps at which queries are asked.
        queries: which of the task's these are, by number; None: all.

    Returns:
        ``(trained, asked)``: the lesser of those for the two sizes of change; 0 where neither sees an effect, NaN where
        the question comes before the bin.
    """
    signs = torch.randint(0, 2, (len(spans), len(trained)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    predicted = torch.einsum("bi,baiq->baq", signs, slopes)[:, :, None]
    measured = _measured(replay, trained, spans, asked, signs)
    measured = measured if queries is None else measured[..., list(queries)]
    size = torch.maximum(predicted.norm(dim=-1), measured.norm(dim=-1))
    wrong = (predicted - measured).norm(dim=-1)
    miss = torch.where(wrong == 0, 0.0, wrong / size).nan_to_num(torch.inf).amin(-1)
    before = torch.tensor([[span.start < step for step in asked] for span in spans])
    return torch.where(before, miss, torch.nan)


def _measured(replay: Replay, trained: Groups, spans: Sequence[range], asked: Sequence[int], signs: Tensor) -> Tensor:
    """Central differences of the query losses ``(trained, asked, change, query)``, float64, on the CPU."""
    rows = [(span, side, change) for span, side in zip(spans, signs, strict=True) for change in CHANGES]
    schedules = [_changed(trained, span, way * change * side) for span, side, change in rows for way in (1, -1)]
    start, size = replay.start, max(2, replay.at_once // 2 * 2)
    parts = []
    for first in range(0, len(schedules), size):
        stack = schedules[first : first + size]
        way, rate = replay.batching, replay.learning_rate
        parts.append(losses_along(start, stack, replay.order, asked, batching=way, learning_rate=rate))
    losses = torch.cat(parts, 1).reshape(len(asked), len(spans), len(CHANGES), 2, -1).movedim(0, 1)
    steps = torch.tensor(CHANGES, dtype=torch.float64)[:, None]
    difference: Tensor = (losses[..., 0, :] - losses[..., 1, :]) / (2 * steps)
    return difference


def _changed(trained: Groups, span: range, by: Tensor) -> Schedule:
    """Weights 1 + by of every group during a bin; ``by`` has one magnitude."""
    samples, each = torch.cat(trained.indices), torch.repeat_interleave(by, torch.tensor(trained.sizes))
    sides = [(samples[each > 0], 1 + float(by.abs()[0])), (samples[each < 0], 1 - float(by.abs()[0]))]
    return Schedule(tuple(Change(span.start, span.stop, index, weight, trained.tokens) for index, weight in sides))
