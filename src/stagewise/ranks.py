"""The processes that hold a model together: what each of them evaluates, and what they tell one another.

Where a model is sharded every process holds some rows of each parameter, and a vector of parameters is in pieces as
well: an inner product is a sum over all processes. All of them must make the same calls in the same order.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

T = TypeVar("T")

_PIECE = 2**20  # entries of a vector that are float64 at a time


class Alone:
    """One process that holds the whole model and evaluates all samples."""

    index = 0
    divided = 1
    """Among how many processes the samples of a batch are divided."""

    def parts(self, rows: Tensor, size: int) -> list[tuple[Tensor, int]]:
        """Which of the samples ``rows`` this process evaluates, at most ``size`` at once.

        With every part, how many of it count: processes that have fewer samples evaluate some again, so that all make
        equally many passes.
        """
        return [(part, len(part)) for part in torch.split(rows, size)]

    def joined(self, values: Sequence[Tensor], count: int) -> Tensor:
        """Values of all ``count`` samples ``(count, ...)``, from those of the parts."""
        del count
        return torch.cat(list(values))

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number

    def gathered(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        return [value]

    def over_samples(self, sums: Tensor) -> Tensor:
        """The sum over all samples, from that over those which count here."""
        return sums

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all parameters, from that over those which are here."""
        return sums

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products of vectors of parameters ``(..., parameters)``."""
        found: Tensor = torch.linalg.vecdot(a, b)
        return found

    def along(self, vectors: Tensor, direction: Tensor) -> Tensor:
        """Inner products of vectors ``(k, parameters)`` with one ``(parameters,)``: ``(k,)``."""
        found: Tensor = vectors @ direction
        return found

    def norm(self, a: Tensor) -> Tensor:
        """Lengths of vectors of parameters ``(..., parameters)``."""
        found: Tensor = torch.linalg.vector_norm(a, dim=-1)
        return found

    def squared_width(self, vectors: Tensor) -> float:
        """Largest sum of the squares of vectors ``(k, parameters)`` along a direction."""
        return float(torch.linalg.matrix_norm(vectors, 2)) ** 2


ALONE = Alone()


@dataclass(frozen=True, eq=False)
class Ranks(Alone):
    """The processes of a group, or one as if it were one of them: sums are made in float64.

    Attributes:
        index: which of them this is.
        count: how many there are.
        split: whether the samples of a batch are divided among them; else each evaluates all.
        group: of ``torch.distributed``; None: this process alone.
    """

    index: int = 0
    count: int = 1
    split: bool = True
    group: Any = None

    @property
    def divided(self) -> int:  # type: ignore[override]
        """Among how many processes the samples of a batch are divided."""
        return self.count if self.split else 1

    def parts(self, rows: Tensor, size: int) -> list[tuple[Tensor, int]]:
        """As of one process; samples are divided in their order."""
        share = -(-len(rows) // self.divided)
        own = rows[self._place * share :][:share]
        parts = torch.split(torch.cat([own, rows[-1:].expand(share - len(own))]), size)
        return [(part, max(0, min(len(part), len(own) - k * size))) for k, part in enumerate(parts)]

    def joined(self, values: Sequence[Tensor], count: int) -> Tensor:
        """As of one process; tokens are padded to those of the longest sample."""
        widest = self.most(max(value.shape[1] if value.ndim > 1 else 0 for value in values))
        own = torch.cat([pad(value, (0, widest - value.shape[1])) if widest else value for value in values])
        if self.divided == 1:
            return own
        all_values = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(all_values, own.contiguous(), group=self.group)
        return torch.cat(all_values)[:count]

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return max(self.gathered(number))

    def over_samples(self, sums: Tensor) -> Tensor:
        """The sum over all samples, from that over those which count here."""
        return self.total(sums) if self.divided > 1 else sums

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all parameters, from that over those which are here."""
        if self.count == 1:
            return sums
        whole = sums.clone()
        dist.all_reduce(whole, group=self.group)
        return whole

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products of vectors of parameters ``(..., parameters)``, float64."""
        pieces = zip(torch.split(a, _PIECE, -1), torch.split(b, _PIECE, -1), strict=True)
        zero = a.new_zeros(a.shape[:-1], dtype=torch.float64)
        return self.total(sum((torch.linalg.vecdot(x.double(), y.double()) for x, y in pieces), zero))

    def along(self, vectors: Tensor, direction: Tensor) -> Tensor:
        """Inner products of vectors ``(k, parameters)`` with one ``(parameters,)``: ``(k,)``, float64."""
        return self.dot(vectors, direction.expand_as(vectors))

    def squared_width(self, vectors: Tensor) -> float:
        """Largest sum of the squares of vectors ``(k, parameters)`` along a direction."""
        zero = vectors.new_zeros(len(vectors), len(vectors), dtype=torch.float64)
        gram = sum((piece @ piece.mT for piece in torch.split(vectors.double(), _PIECE, -1)), zero)
        return float(torch.linalg.eigvalsh(self.total(gram))[-1].clamp(min=0))

    def norm(self, a: Tensor) -> Tensor:
        """Lengths of vectors of parameters ``(..., parameters)``, float64."""
        return self.dot(a, a).sqrt()

    def gathered(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; and what it raises."""
        return self.agreed(make if self.index == 0 else lambda: None)[0]  # type: ignore[return-value]

    def agreed(self, make: Callable[[], T]) -> list[T]:
        """What every process makes, in their order; where one raises an error, all do.

        A process that went on alone would wait for the others for ever.
        """
        if self.count == 1:
            return [make()]
        made: tuple[T | None, Exception | None]
        own: Exception | None = None
        try:
            made = pickle.loads(pickle.dumps(make())), None  # what cannot be sent is an error here, not in sending
        except Exception as error:
            own, made = error, (None, _sendable(error))
        everyones = self.gathered(made)
        if failed := next((error for _, error in everyones if error is not None), None):
            raise own or failed
        return [value for value, _ in everyones]  # type: ignore[misc]

    def together(self, make: Callable[[], T]) -> T:
        """What this process makes, which stays here; where one raises, all do."""
        own: list[T] = []

        def kept() -> None:
            own.append(make())

        self.agreed(kept)
        return own[0]

    @property
    def _place(self) -> int:
        """Which share of the samples is this process's."""
        return self.index if self.split else 0


def _sendable(error: Exception) -> Exception:
    """The error, or its words where other processes could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
