"""Gauss-Newton curvature: that of the loss in the model's outputs, carried back to the parameters.

Positive wherever the loss is convex in the outputs, so that damped solves exist at every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from stagewise.attention import plain_attention
from stagewise.data import Batch
from stagewise.derivatives import Product
from stagewise.differentiate import differentiable, gradient, pull, push
from stagewise.evaluate import Point, chunks
from stagewise.memory import out_of_memory
from stagewise.plain import cannot
from stagewise.task import checked_losses
from stagewise.twice import second_derivatives

_TOLERANCE = 1e-2
_REMEDY = "damped_influence(..., curvature='hessian') does without"

Rebuild = Callable[[list[Tensor]], Any]


def gauss_newton_product(point: Point, u: Tensor, rows: Tensor | None = None) -> Product:
    """Vectors ``(k, parameters)`` to J^T B J v, B the Hessian of the objective in the model's outputs.

    Args:
        point: the task.
        u: where ``(parameters,)``.
        rows: the training samples, default all.

    Raises:
        ValueError: (when called) the loss does not call the model exactly once, the outputs hold no tensors, or the
            loss depends on the parameters beside the outputs, or an operation has no second derivative.
    """
    task, trusted = point.task, False

    def product(vectors: Tensor) -> Tensor:
        nonlocal trusted
        image, weight = torch.zeros_like(vectors), 0.0
        for batch in chunks(task, task.train, rows):
            with plain_attention(), differentiable(u) as leaf:
                outputs, rebuild = _taken_apart(_outputs(point, leaf, batch))
                cut = [tensor.detach().requires_grad_() for tensor in outputs]
                losses, weights = task.by_sample(_losses_of(point, u, rebuild(cut), batch))
                value = (weights * losses).sum()
                slopes = _slopes(value, cut)
                if not trusted:
                    _check_outputs_suffice(point, batch, leaf, outputs, slopes)
                    trusted = True
                with second_derivatives("Gauss-Newton curvature", _REMEDY):
                    bent = pull(slopes, cut, push(outputs, leaf, vectors))
                image += pull(outputs, [leaf], bent)[0]
            weight += float(weights.sum())
        return image / weight

    return product


def _slopes(value: Tensor, cut: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in cut]
    return list(torch.autograd.grad(value, cut, create_graph=True, allow_unused=True, materialize_grads=True))


def _check_outputs_suffice(
    point: Point, batch: Batch, leaf: Tensor, outputs: list[Tensor], slopes: list[Tensor]
) -> None:
    """A loss that uses the parameters directly (a penalty) is not a function of the outputs."""
    losses, weights = point.sample_losses(leaf, batch)
    whole = gradient((weights * losses).sum(), leaf)
    through = pull(outputs, [leaf], [slope.detach()[None] for slope in slopes])[0][0]
    if (whole - through).norm() > _TOLERANCE * whole.norm() + 1e-6:
        raise ValueError(
            "Gauss-Newton curvature needs a loss that depends on the parameters through the model's outputs only; "
            f"this one also uses them directly; {_REMEDY}"
        )


class _StandIn:
    """The model inside a loss: it is called once, and knows the model's attributes (device, config, ...)."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __getitem__(self, key: Any) -> Any:
        return self._model[key]

    def __iter__(self) -> Any:
        return iter(self._model)

    def __len__(self) -> int:
        return len(self._model)


def _outputs(point: Point, u: Tensor, batch: Batch) -> Any:
    """What the model returns inside the loss."""
    found: list[Any] = []
    with point.task.pure.holding(point.params(u)) as model:

        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(model(*args, **kwargs))
            return found[-1]

        point.task.loss(_StandIn(model, call), batch)
    if len(found) != 1:
        raise ValueError(
            f"Gauss-Newton curvature needs a loss that calls the model once, as model(...), got {len(found)} calls; "
            f"{_REMEDY}"
        )
    return found[0]


def _losses_of(point: Point, u: Tensor, outputs: Any, batch: Batch) -> Any:
    """The losses that follow from given outputs of the model."""
    with point.task.pure.holding(point.params(u.detach())) as model:
        stand_in = _StandIn(model, lambda *_args, **_kwargs: outputs)
        try:
            return checked_losses(point.task.loss(stand_in, batch))
        except Exception as error:  # it may need what the forward pass leaves behind, or its derivative by the inputs
            if out_of_memory(error):
                raise
            raise ValueError(
                "Gauss-Newton curvature needs a loss that follows from the model's outputs alone; "
                f"{cannot(error, 'from them')}; {_REMEDY}"
            ) from error


def _taken_apart(outputs: Any) -> tuple[list[Tensor], Rebuild]:
    """The differentiable tensors in a model's outputs, and how to put others in their place.

    Whatever else is there (None, caches, numbers) stays as it is.
    """
    leaves, structure = tree_flatten(outputs)
    if leaves and leaves[0] is outputs and is_dataclass(outputs) and not isinstance(outputs, type):
        tensors, inner = _taken_apart({f.name: getattr(outputs, f.name) for f in fields(outputs)})
        return tensors, lambda new: replace(outputs, **inner(new))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not places:
        raise ValueError(
            f"the model returned {type(outputs).__name__}, in which no tensors were found; Gauss-Newton curvature "
            f"needs a tensor, or a tuple, list, dict or dataclass of tensors; {_REMEDY}"
        )

    def rebuild(new: list[Tensor]) -> Any:
        put = dict(zip(places, new, strict=True))
        return tree_unflatten([put.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return [leaves[i] for i in places], rebuild
