"""Losses of every kind, in every form in which Python has functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``(..., outputs)`` and targets to losses ``(...)``."""


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.movedim(-1, 1), y, reduction="none")


def smoothed(outputs: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.movedim(-1, 1), y, reduction="none", label_smoothing=0.2)


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y.to(outputs.dtype)).square().mean(-1)


def binary(outputs: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, y.to(outputs.dtype), reduction="none").mean(-1)


def huber(outputs: Tensor, y: Tensor) -> Tensor:
    return (1 + (outputs - y.to(outputs.dtype)).square()).sqrt().mean(-1)


def summed(outputs: Tensor, y: Tensor) -> Tensor:
    """One loss per sequence: the sum over its tokens."""
    return cross_entropy(outputs, y).sum(1)


def output_size(outputs: Tensor, _y: Tensor) -> Tensor:
    """What is measured on queries instead of a loss; no weights belong to it."""
    return outputs.square().mean(-1)


CLASSES = ("cross-entropy", "smoothed", "summed")
CRITERIA: dict[str, Criterion] = {
    "cross-entropy": cross_entropy,
    "smoothed": smoothed,
    "summed": summed,
    "squares": squares,
    "binary": binary,
    "huber": huber,
}


def measure(model: Any, batch: Any, named: bool, criterion: Criterion, weighted: bool) -> Any:
    """What every loss here does."""
    x, y = (batch["x"], batch["y"]) if named else (batch[0], batch[1])
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    outputs = model(x)
    values = criterion(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), y)
    if not weighted:
        return values
    return values, (batch["w"] if named else batch[2])


class CallableObject:
    def __init__(self, named, criterion, weighted):
        self.settings = (named, criterion, weighted)

    def __call__(self, model, batch):
        return measure(model, batch, *self.settings)

    def method(self, model, batch):
        return self(model, batch)


class LossModule(nn.Module):
    def __init__(self, named, criterion, weighted):
        super().__init__()
        self.settings = (named, criterion, weighted)

    def forward(self, model, batch):
        return measure(model, batch, *self.settings)


def closure(named, criterion, weighted):
    def loss(model, batch):
        return measure(model, batch, named, criterion, weighted)

    return loss


CARRIERS: dict[str, Callable[[bool, Criterion, bool], Callable[[Any, Any], Any]]] = {
    "closure": closure,
    "lambda": lambda n, c, w: lambda model, batch: measure(model, batch, n, c, w),
    "partial": lambda n, c, w: partial(measure, named=n, criterion=c, weighted=w),
    "object": CallableObject,
    "bound method": lambda n, c, w: CallableObject(n, c, w).method,
    "module": LossModule,
}
"""By what carries the function."""
