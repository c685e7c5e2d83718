"""Derivatives against differences: does something hide from differentiation?

A model whose forward pass hides a part of itself (``torch.no_grad``, ``detach``, rounding with a straight-through
gradient) trains well, but its gradient is not that of its loss, and its curvature is that of nothing. Differences show
it: where they converge to something else than the derivatives say, the model is refused. Where they do not converge
(kinks, overflow, rounding) nothing is known, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stagewise.attention import plain_attention
from stagewise.double import InDouble, doubled
from stagewise.functional import unchanged
from stagewise.memory import give_back, out_of_memory
from stagewise.plain import cannot, objective, plain_losses
from stagewise.task import Batch, Task
from stagewise.twice import once_only


class _Ladder(NamedTuple):
    """How derivatives and differences are compared in one precision.

    Attributes:
        steps: of the differences, relative to the size of each parameter. Small ones first: they meet no kinks.
        value: relative error from which on the change of the loss is another one than the gradient says.
        gradient: the same of the change of the gradient; kinks, which differentiation does not see, add to it.
        rounding: of a loss, relative.
    """

    steps: tuple[float, ...]
    value: float
    gradient: float
    rounding: float


_DOUBLE = _Ladder((1e-7, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2), 1e-3, 3e-2, 1e-13)
_SINGLE = _Ladder((1e-3, 1e-2, 1e-4), 5e-2, 0.5, 1e-5)
# Differences are taken for converged where two of them agree this many times better than the error that is looked for.
_SHARPER = 5
# So small a relative change, when all parameters change by their own size, is none.
_NOTHING = 1e-6
# Gradients of more parameters are compared by as many random sums of their entries.
_SUMS = 2**20
_LARGE = 2**23


def is_large(task: Task) -> bool:
    """Whether copies of the model in float64 are more than a check may cost: from about 8 million parameters on."""
    return sum(tensor.numel() for tensor in task.trainable.values()) > _LARGE


def check_differences(task: Task, params: Mapping[str, Tensor], batch: Batch) -> None:
    """Compare gradient and Hessian product of the pure function with differences of plain losses and gradients.

    In float64 where the model can, and is not large.

    Raises:
        ValueError: they disagree, or second derivatives do not exist.
    """
    for ladder in (_SINGLE,) if is_large(task) else (_DOUBLE, _SINGLE):
        try:
            fault = _fault(task, params, batch, ladder)
        except (RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            if ladder is _DOUBLE:
                continue
            raise ValueError(
                f"train: {cannot(error, 'twice differentiated')}. Use operations that have second derivatives; "
                "gradient_product, tracin and retraining do without them"
            ) from error
        if fault:
            raise ValueError(
                f"train: {fault}. Something in the model or the loss is hidden from differentiation (torch.no_grad, "
                "detach, .data, .item(), rounding with a straight-through gradient) or has a wrong second derivative, "
                "so that curvature and chains would not be those of training. gradient_product, tracin and retraining "
                "can be used"
            )
        return


def _fault(task: Task, params: Mapping[str, Tensor], batch: Batch, ladder: _Ladder) -> str:
    """What differs, in words; empty if nothing does."""
    double = ladder is _DOUBLE
    batch = doubled(batch) if double else batch
    with InDouble() if double else nullcontext() as mode, plain_attention():
        fault = _compared(task, params, batch, ladder)
    if mode and mode.failed:
        raise TypeError("the loss is not computed in float64")
    return fault


def _compared(task: Task, params: Mapping[str, Tensor], batch: Batch, ladder: _Ladder) -> str:
    own = doubled(dict(params)) if ladder is _DOUBLE else params
    direction = _direction(task, own)
    slope, image = _derivatives(task, own, batch, direction)
    del own  # of large models every copy counts
    if is_large(task):
        give_back()
    value, gradient = _along(task, params, batch, direction, ladder)
    # A small loss is the difference of numbers of order 1 (logits), and rounded as they are; so is its gradient.
    rounding = ladder.rounding * max(1.0, abs(value(0.0).item()))

    def differ(found: Tensor, function: Callable[[float], Tensor], tolerance: float, sharp: float) -> Tensor | None:
        """What the differences converge to, if it is something else."""
        before: list[Tensor] = []
        nothing = _NOTHING * function(0.0).norm().item()
        for step in ladder.steps:
            now = _central(function, step)
            if _near(found, now, tolerance, nothing):
                return None
            seen = max(abs(slope.item()), abs(_central(value, step).item()))
            if rounding / step > sharp * seen:
                continue  # too small a change of the loss to be seen at this step
            if any(_near(now, other, tolerance / _SHARPER) for other in before):
                return now
            before.append(now)
        return None

    if (change := differ(slope, value, ladder.value, ladder.value)) is not None:
        return f"along a direction the loss changes by {change.item():.4g}, by its gradient it should by {slope:.4g}"
    if image is not None and (bend := differ(image, gradient, ladder.gradient, 0.1)) is not None:
        error = ((image - bend).norm() / torch.maximum(image.norm(), bend.norm())).item()
        return f"second derivatives miss the change of the gradient along a direction by {error:.0%}"
    return ""


def _central(function: Callable[[float], Tensor], step: float) -> Tensor:
    return (function(step) - function(-step)) / (2 * step)


def _derivatives(
    task: Task, params: Mapping[str, Tensor], batch: Batch, direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Of the objective of the pure function along a direction: slope, and Hessian product as :func:`_flat` has it.

    The product is None where an operation has no second derivative: then curvature is taken from differences of
    gradients, and there is nothing to compare.
    """
    leaves = {name: params[name].detach().requires_grad_() for name in direction}
    every = list(leaves.values())
    with torch.enable_grad():
        value = objective(task, task.weighted_losses({**params, **leaves}, batch))
        slopes = torch.autograd.grad(value, every, create_graph=True, materialize_grads=True, allow_unused=True)
        along = torch.stack([(g * d).sum() for g, d in zip(slopes, direction.values(), strict=True)]).sum()
        del slopes  # the graph lets go of them on the way
        if not along.requires_grad:
            return along.detach(), _flat([torch.zeros_like(leaf) for leaf in every])
        try:
            image = list(torch.autograd.grad(along, every, materialize_grads=True, allow_unused=True))
        except RuntimeError as error:
            if not once_only(error):
                raise
            return along.detach(), None
    return along.detach(), _flat(image)


def _along(
    task: Task, params: Mapping[str, Tensor], batch: Batch, direction: Mapping[str, Tensor], ladder: _Ladder
) -> tuple[Callable[[float], Tensor], Callable[[float], Tensor]]:
    """The objective and its gradient of an ordinary module, by the distance along a direction."""
    double = ladder is _DOUBLE
    model = task.pure.reference(params, torch.float64 if double else None)
    own = dict(model.named_parameters())

    def there(distance: float, grad: bool) -> Tensor:
        with torch.no_grad():
            for name, d in direction.items():
                own[name].copy_(params[name] + distance * d)
        with unchanged(model):
            return objective(task, plain_losses(task, model, task.train, None, batch, grad=grad))

    @cache
    def value(distance: float) -> Tensor:
        return there(distance, grad=False)

    def gradient(distance: float) -> Tensor:
        chosen = [own[name] for name in direction]
        slopes = torch.autograd.grad(there(distance, grad=True), chosen, materialize_grads=True, allow_unused=True)
        return _flat([g.to_dense() for g in slopes])

    return value, gradient


def _direction(task: Task, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random direction in which every parameter changes by about its size, without what training never moves."""
    generator = torch.Generator().manual_seed(0)
    direction = {}
    for name in task.trainable:
        tensor = params[name]
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        direction[name] = noise * (tensor.square().mean().sqrt() + 0.01)
        if (rows := task.pure.padding.get(name)) is not None:
            direction[name][rows] = 0.0
    return direction


def _near(ours: Tensor, theirs: Tensor, tolerance: float, nothing: float = 0.0) -> bool:
    return bool((ours - theirs).norm() <= tolerance * torch.maximum(ours.norm(), theirs.norm()) + nothing)


def _flat(tensors: list[Tensor]) -> Tensor:
    """All entries in a row; those of a large model folded with random signs, which keeps norms to a few per mille."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    if sum(map(len, flat)) <= _SUMS:
        return torch.cat(flat)
    generator, sums = torch.Generator().manual_seed(0), flat[0].new_zeros(_SUMS)
    for piece in (piece for entries in flat for piece in torch.split(entries, _SUMS)):
        signs = 2 * torch.randint(2, (len(piece),), generator=generator, dtype=torch.int8) - 1
        sums[: len(piece)] += signs.to(piece) * piece
    return sums
