"""The part of a tensor that one of several processes holds. This is ground: it imports nothing from the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that is here: a range along one axis.

    Attributes:
        shape: of the whole tensor.
        start: where the part begins.
        size: how long it is; 0 where there are fewer rows than processes.
        axis: along which the tensor is cut.
    """

    shape: tuple[int, ...]
    start: int
    size: int
    axis: int = 0

    @classmethod
    def held(cls, shape: tuple[int, ...], index: int, count: int, axis: int = 0) -> Piece:
        """The part of a tensor of this shape that one of ``count`` processes holds, as ``torch.chunk`` cuts."""
        most = -(-shape[axis] // count)
        start = min(index * most, shape[axis])
        return cls(shape, start, min(most, shape[axis] - start), axis)

    @property
    def own(self) -> tuple[int, ...]:
        """Shape of the part."""
        return (*self.shape[: self.axis], self.size, *self.shape[self.axis + 1 :]) if self.shape else ()

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor."""
        return tensor.narrow(self.axis, self.start, self.size)


Wanted = Callable[[str, tuple[int, ...]], Piece | None]
"""From the name of a tensor in a file and its shape to the rows of it that are read; None: all."""
