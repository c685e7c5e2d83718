"""The parameters that move, as one vector.

Samplers, solvers and retraining all work on flat vectors of shape ``(..., parameters)``; this file is the only
place that knows how a vector maps to the model's named tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewise.task import Params, Task


@dataclass(frozen=True)
class ParameterVector:
    """A choice and an order of parameters.

    Attributes:
        names: the parameters that move, in the order of the vector.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, task: Task, patterns: Sequence[str] = (".*",)) -> ParameterVector:
        """The trainable parameters whose full name matches one of the regular expressions.

        Raises:
            ValueError: a pattern matches nothing, with the names there are.
        """
        trainable = {n: tuple(p.shape) for n, p in task.model.named_parameters() if p.requires_grad}
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in trainable):
                raise ValueError(f"no trainable parameter matches {pattern!r}; there are {sorted(trainable)}")
        chosen = {n: s for n, s in trainable.items() if any(re.fullmatch(p, n) for p in patterns)}
        return cls(tuple(chosen), tuple(chosen.values()))

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, tensors: Mapping[str, Tensor], like: Tensor | None = None) -> Tensor:
        """Named tensors to a vector ``(parameters,)``, on the device and dtype of ``like`` if given."""
        vector = torch.cat([tensors[name].detach().reshape(-1) for name in self.names])
        return vector if like is None else vector.to(like)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector ``(..., parameters)`` to named tensors ``(..., *shape)``; views, no copies."""
        pieces = torch.split(vector, [math.prod(shape) for shape in self.shapes], dim=-1)
        lead = vector.shape[:-1]
        return {n: t.reshape((*lead, *s)) for n, s, t in zip(self.names, self.shapes, pieces, strict=True)}

    def fixed(self, params: Params) -> dict[str, Tensor]:
        """The parameters and buffers that do not move."""
        return {name: tensor for name, tensor in params.items() if name not in self.names}
