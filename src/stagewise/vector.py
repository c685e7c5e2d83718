"""The parameters that move, as one vector.

Samplers, solvers and retraining all work on flat vectors of shape ``(..., parameters)``; this file is the only
place that knows how a vector maps to the model's named tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from stagewise.task import Params, Task


@dataclass(frozen=True)
class ParameterVector:
    """A choice and an order of parameters.

    Attributes:
        names: the parameters that move, in the order of the vector.
        shapes: their shapes.
        dtypes: their types, at least float32. The vector has the widest of them.
        whole: the number of their entries, where only some rows of each are here; 0: all are.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    whole: int = 0

    @classmethod
    def of(
        cls, task: Task, patterns: Sequence[str] = (".*",), updated: Collection[str] | None = None
    ) -> ParameterVector:
        """The trainable parameters whose full name matches one of the regular expressions.

        Args:
            task: whose model.
            patterns: regular expressions.
            updated: only these, e.g. those that the optimiser updates; default all.

        Raises:
            ValueError: a pattern matches nothing, with the names there are, or no parameter is left.
        """
        trainable = task.trainable
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in trainable):
                raise ValueError(f"no trainable parameter matches {pattern!r}; there are {sorted(trainable)}")
        chosen = {
            name: tensor
            for name, tensor in trainable.items()
            if any(re.fullmatch(p, name) for p in patterns) and (updated is None or name in updated)
        }
        if not chosen:
            raise ValueError(
                f"no parameter moves: trainable are {sorted(trainable)}, the patterns are {list(patterns)}, and the "
                f"optimizer updates {'all' if updated is None else sorted(updated)}; call requires_grad_(True) on "
                "those that training moved"
            )
        dtypes = tuple(torch.promote_types(t.dtype, torch.float32) for t in chosen.values())
        whole = sum(map(task.pure.entries, chosen))
        return cls(tuple(chosen), tuple(tuple(t.shape) for t in chosen.values()), dtypes, whole)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def count(self) -> int:
        """Length of the vectors of all processes that hold the model together."""
        return self.whole or self.size

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vector: the widest of its parameters'."""
        return reduce(torch.promote_types, self.dtypes)

    def flatten(self, tensors: Mapping[str, Tensor], like: Tensor | None = None) -> Tensor:
        """Named tensors to a vector ``(parameters,)``, on the device and dtype of ``like`` if given."""
        vector = torch.cat([tensors[name].detach().to(self.dtype).reshape(-1) for name in self.names])
        return vector if like is None else vector.to(like)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector ``(..., parameters)`` to named tensors ``(..., *shape)``: views, but where the types differ.

        A vector of another type than the parameters' (float64 for a check) gives tensors of its own type.
        """
        pieces = torch.split(vector, [math.prod(shape) for shape in self.shapes], dim=-1)
        lead = vector.shape[:-1]
        named = zip(self.names, self.shapes, self.dtypes, pieces, strict=True)
        own = vector.dtype == self.dtype
        return {name: (t.to(d) if own else t).reshape((*lead, *s)) for name, s, d, t in named}

    def spread(self, values: Tensor) -> Tensor:
        """One value for every name ``(..., names)`` to one for every entry of the vector ``(..., parameters)``."""
        sizes = torch.tensor([math.prod(shape) for shape in self.shapes], device=values.device)
        return values.repeat_interleave(sizes, dim=-1)

    def fixed(self, params: Params) -> dict[str, Tensor]:
        """The parameters and buffers that do not move."""
        return {name: tensor for name, tensor in params.items() if name not in self.names}
