"""Is the loss one that can be used, and its gradient that of training? One look at a few samples.

There is no second model of this size to compare with: what is differentiated is the model itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from stagewise.check import check_form
from stagewise.data import Samples
from stagewise.evaluate import Point
from stagewise.in_place import InPlaceModel
from stagewise.ranks import Ranks
from stagewise.sampling.base import standard_normal
from stagewise.sampling.noise import noise_source
from stagewise.sharded.precision import LowPrecision
from stagewise.slopes import weighted_slope
from stagewise.task import Task
from stagewise.tokens import check_tokens

_FEW, _MANY = 4, 64
_STEPS = (1e-3, 1e-2, 1e-4)  # of the size of a parameter
_SLOPE, _CONVERGED = 5e-2, 1e-2


def check(point: Point, ranks: Ranks) -> None:
    """Refuse losses that no estimator could use; once for a task.

    All processes evaluate the same few samples, and where one of them refuses, all do.

    Raises:
        ValueError: losses have another form than one per sample or token, are not finite, change between two
            evaluations or depend on the rest of the batch; or the gradient is not that of the losses.
    """
    task = point.task
    if "model" in task.checked:
        return
    task.pure.refuse()
    for data, query in _data_sets(task):
        ranks.together(data.check_steady)
        ranks.together(partial(check_tokens, task, data))
        _check_losses(point, ranks, data, query)
    _check_slope(point)
    task.checked.add("model")


@torch.no_grad()
def check_padding(point: Point, ranks: Ranks) -> None:
    """Refuse padding rows that a tied layer moves, where looking them up changes losses, which differences would see.

    Gradients leave out what is looked up there, and training goes by gradients.

    Raises:
        ValueError: with the data, in all processes.
    """
    task = point.task
    for embedding in cast(InPlaceModel, task.pure).tied_padding:

        def moved(
            module: nn.Module, args: Any, kwargs: Any, output: Tensor, row: Any = embedding.padding_idx
        ) -> Tensor:
            del module
            looked_up = next(iter([*args, *kwargs.values()])) == row
            along = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype, device=output.device)
            return torch.where(looked_up[..., None], output + along, output)

        for data, query in _data_sets(task):
            batch = data.batch(data.few(min(_MANY, task.forward_batch)), task.device)
            before = task.weighted_losses(point.state, batch, query).values
            with embedding.register_forward_hook(moved, with_kwargs=True):
                after = task.weighted_losses(point.state, batch, query).values
            ranks.together(partial(_check_unmoved, data, before, after, embedding))


def _check_unmoved(data: Samples, before: Tensor, after: Tensor, embedding: Any) -> None:
    if not torch.allclose(before, after, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"{data.name}: losses depend on looking up {embedding.padding_idx}, the padding_idx of an embedding that "
            "is tied to another layer: its row moves in training, but not by its lookups, and exact influence of a "
            "sharded model cannot tell these apart; leave such samples out, or build the model with padding_idx=None"
        )


def _data_sets(task: Task) -> list[tuple[Samples, str | None]]:
    return [(task.train, None), *((data, name) for name, data in task.queries.items())]


@torch.no_grad()
def _check_losses(point: Point, ranks: Ranks, data: Samples, query: str | None) -> None:
    task, few = point.task, data.few(_FEW)

    def losses(rows: Tensor) -> Tensor:
        found = task.weighted_losses(point.state, data.batch(rows, task.device), query)
        ranks.together(lambda: check_form(task, found, data, rows))
        return task.by_sample(found)[0]

    with LowPrecision() as seen, torch.enable_grad():
        first = losses(few).detach()
    if found := next(filter(None, ranks.gathered(seen.found)), ""):
        raise ValueError(
            f"{data.name}: the loss computes {found}, to which displacements of the weights would be rounded at every "
            "evaluation; a sharded model is evaluated in float32: leave out torch.autocast and casts of one's own"
        )
    second, alone = losses(few), torch.cat([losses(row[None]) for row in few])
    ranks.together(lambda: _check_same(data, few, first, second, alone))


def _check_same(data: Samples, few: Tensor, first: Tensor, second: Tensor, alone: Tensor) -> None:
    """Whether a few losses are the same again, and alone; rounding may let this process see it and others not."""
    if not torch.allclose(first, second, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"{data.name}: two evaluations of the same batch differ by up to {float((first - second).abs().max()):.3g} "
            "nats; losses must be deterministic. Switch off dropout and random augmentation"
        )
    if not torch.allclose(first, alone, rtol=1e-2, atol=1e-5):
        worst = int((first - alone).abs().argmax())
        raise ValueError(
            f"{data.name}: the loss of sample {int(few[worst])} depends on the rest of its batch ({first[worst]:.5g} "
            f"beside others, {alone[worst]:.5g} alone); such losses cannot be attributed to samples"
        )


def _check_slope(point: Point) -> None:
    """The gradient along a random direction, as the processes add it up, against differences of the losses."""
    task, ranks, place = point.task, point.task.ranks, point.vector.flatten(point.state)
    rows = task.train.few(_FEW)
    noise = standard_normal(place[None], noise_source(point, 0, 0, "check", 1))[0]
    # Of the size of each parameter, in whichever process it has most.
    own = [float(point.state[name].square().mean().sqrt().nan_to_num()) + 0.01 for name in point.vector.names]
    sizes = torch.tensor(ranks.gathered(own)).amax(0)
    direction = noise * point.vector.spread(sizes).to(noise)
    parts = point.vector.unflatten(direction)
    for name in task.pure.padding.keys() & parts.keys():
        parts[name][task.pure.padding[name]] = 0.0  # training never moves it by what is looked up
    direction = point.vector.flatten(parts, like=direction)
    slope, weight = weighted_slope(point, place, task.train, rows)
    expected = float(ranks.along(slope[None], direction)[0])

    def value(distance: float) -> float:
        with torch.no_grad():
            losses, weights = point.sample_losses(place + distance * direction, task.train.batch(rows, task.device))
        return ranks.gathered(float((weights * losses).sum().double()))[0]

    before: list[float] = []
    for step in _STEPS:
        now = (value(step) - value(-step)) / (2 * step)
        size = max(abs(now), abs(expected))
        rounding = 1e-5 * max(1.0, abs(value(0.0))) / step
        if abs(now - expected) <= _SLOPE * size + rounding:
            return
        if any(abs(now - other) <= _CONVERGED * size for other in before):
            raise ValueError(
                f"train: along a direction the losses change by {now / weight:.4g}, by their gradient they should by "
                f"{expected / weight:.4g}; something in the model or the loss is hidden from differentiation, or "
                "gradients are not reduced to their mean over the processes"
            )
        before.append(now)
