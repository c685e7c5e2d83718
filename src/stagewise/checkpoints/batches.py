"""Which training samples updates used: as they are given, kept and stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAMPLES, _SIZES = "batches/samples", "batches/sizes"


class Batches:
    """The samples of updates, by the number of updates made when theirs was done."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def keep(self, step: int, samples: Tensor) -> None:
        """Those of the update that led to ``step``."""
        self._kept[step] = samples

    def of(self, steps: range) -> tuple[Tensor, ...]:
        """Those of the updates that led to these steps; empty where some are not known."""
        return tuple(self._kept[step] for step in steps) if all(step in self._kept for step in steps) else ()

    def gap(self, steps: range) -> int | None:
        """The first of these steps that is not known, although others are."""
        unknown = [step for step in steps if step not in self._kept]
        return unknown[0] if 0 < len(unknown) < len(steps) else None

    def forget(self) -> None:
        """Make room: those of the updates from now on are asked for."""
        self._kept = {}


def sample_indices(given: Any) -> Tensor:
    """The samples of an update ``(samples,)``, int64: a copy on the CPU.

    Args:
        given: a tensor, array or sequence of integers, or a sequence of those: its micro-batches.

    Raises:
        ValueError: they are not integers, there are none, they have another shape, or some are negative.
    """
    if isinstance(given, list | tuple) and given and all(np.ndim(part) == 1 for part in given):
        return torch.cat([sample_indices(part) for part in given])
    try:
        indices = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the indices of samples must be integers, got {type(given).__name__}: {error}") from error
    return _checked(indices.detach().to("cpu", copy=True))


def packed(batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Two tensors that hold all batches; none where there are none."""
    if not batches:
        return {}
    return {_SAMPLES: torch.cat(list(batches)), _SIZES: torch.tensor([len(batch) for batch in batches])}


def unpacked(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The batches among the tensors of a file; empty where it has none.

    Raises:
        ValueError: they cannot be batches: the message says why.
    """
    found = {key for key in (_SAMPLES, _SIZES) if key in tensors}
    if not found:
        return ()
    if len(found) == 1:
        raise ValueError(f"it has {found.pop()!r} alone, of {_SAMPLES!r} and {_SIZES!r}")
    samples, sizes = _checked(tensors[_SAMPLES], _SAMPLES), _checked(tensors[_SIZES], _SIZES)
    if not sizes.all():
        raise ValueError(f"{_SIZES!r} has a batch without samples")
    if sizes.sum() != len(samples):
        raise ValueError(f"{_SIZES!r} add up to {sizes.sum()} samples, but {_SAMPLES!r} has {len(samples)}")
    return torch.split(samples, sizes.tolist())


def is_packed(name: str) -> bool:
    """Whether a tensor of a file is one of those that hold the batches."""
    return name in (_SAMPLES, _SIZES)


def _checked(indices: Tensor, name: str = "the indices of samples") -> Tensor:
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {indices.dtype}")
    if indices.dim() != 1 or not len(indices):
        raise ValueError(f"{name} must be one or more in a row, got the shape {tuple(indices.shape)}")
    indices = indices.long()
    if indices.min() < 0:
        raise ValueError(f"{name} must not be negative, got {indices.min()}")
    return indices
