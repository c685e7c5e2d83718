"""Which samples a data loader hands out, seen where their indices are drawn.

Loaders read ahead: when a batch is trained on, the indices of later ones have been drawn. So all that are drawn are
kept by their place in the pass over the data, until somebody says how far training has come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from stagewise.checkpoints.batches import sample_indices


class DrawnBatches:
    """The batches of the pass over the data that is under way, by their place in it."""

    def __init__(self) -> None:
        self._drawn: dict[int, Tensor] = {}
        self._passes = 0

    def begin(self) -> None:
        """The next pass that draws batches is the one that training makes."""
        self._drawn = {}
        self._passes = 0

    def look_at(self, batches: Any) -> Iterator[Any]:
        """The batches of a pass, seen as they are drawn."""
        self._passes += 1
        for place, batch in enumerate(batches):
            if self._passes == 1 and isinstance(batch, list | tuple | Tensor):
                with suppress(ValueError):  # keys of another kind: then it is not known
                    self._drawn[place] = sample_indices(batch)
            yield batch

    def take(self, places: range) -> list[Tensor] | None:
        """The batches at these places, after which those before are not asked for; None if some are not known."""
        taken = [self._drawn.get(place) for place in places]
        self._drawn = {place: batch for place, batch in self._drawn.items() if place >= places.stop}
        known = [batch for batch in taken if batch is not None]
        # With several passes at once nobody knows which of them is trained on.
        return known if len(known) == len(taken) and self._passes == 1 else None


def watched(loader: Any) -> DrawnBatches | None:
    """The batches that a loader of ``accelerate`` is going to draw, None where they cannot be known.

    They are drawn as before, in the same order and at the same time.
    """
    base = getattr(loader, "base_dataloader", None)  # made by accelerate: the user's own loader is left alone
    if type(base) is not DataLoader or isinstance(base.dataset, IterableDataset):
        return None
    if base.batch_sampler is None or not getattr(base, "in_order", True):
        return None
    drawn = DrawnBatches()
    # A loader refuses another sampler, because it might have begun to draw; this one draws what that one does.
    vars(base)["batch_sampler"] = _Watched(base.batch_sampler, drawn)
    return drawn


class _Watched(BatchSampler):
    """A batch sampler in all its ways, looked at while it draws."""

    def __init__(self, sampler: Any, drawn: DrawnBatches) -> None:
        self._sampler = sampler
        self._looking = drawn

    def __iter__(self) -> Iterator[Any]:
        return self._looking.look_at(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # not there while it is being copied
            raise AttributeError(name)
        return getattr(self._sampler, name)
