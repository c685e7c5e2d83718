"""What every training step sees: which samples, in which order, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stagewise.during import WHOLE_RUN

Order = Callable[[int], Tensor]
"""``order(step) -> (batch,)``: the training samples of the update made at ``step``."""

LearningRate = Callable[[int], float]
"""``learning_rate(step)``: of the update made at ``step``."""


@dataclass(frozen=True, eq=False)
class Change:
    """Training samples whose weight differs from 1 at the steps ``start <= step < stop``.

    Attributes:
        start: first step that is changed.
        stop: first step that is not changed any more.
        samples: indices of training samples.
        weight: their weight beta, or that of each ``(samples,)``; 0 removes them.
        tokens: how many a sample has, where ``samples`` are tokens: token t of sample i is i * tokens + t. 0: samples.
    """

    start: int
    stop: int
    samples: Tensor
    weight: float | Tensor
    tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a change lasts from start to stop > start >= 0, got [{self.start}, {self.stop})")
        weight = torch.as_tensor(self.weight, dtype=torch.float64)
        if not weight.isfinite().all():
            raise ValueError(f"weight must be finite, got {weight[~weight.isfinite()].flatten()[0].item()}")
        if weight.ndim and weight.shape != self.samples.shape:
            raise ValueError(f"there are weights {tuple(weight.shape)} for samples {tuple(self.samples.shape)}")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The weight beta_i(t) of every training sample at every training step.

    A replay with this schedule minimises, on a batch B_t,

        L_t(w) = sum_{i in B_t} beta_i(t) a_i l_i(w)  /  sum_{i in B_t} a_i

    with a_i the sample's weight in the objective (1, or that of its tokens), so that beta is left out below the
    line. Dividing by the sum of beta_i a_i instead would raise the step size of all other samples whenever one is
    down-weighted: the changed run would be ahead at every transition, and that head start, not the missing samples,
    would be what is measured.

    Attributes:
        changes: the changes to the weight 1; where they overlap, the later one in the tuple holds.

    Example:
        >>> import stagewise as sw
        >>> schedule = sw.Schedule.window([0, 2], 5, 10, weight=0.8)
        >>> schedule.weights(14, 4).tolist(), schedule.weights(15, 4).tolist()
        ([0.8, 1.0, 0.8, 1.0], [1.0, 1.0, 1.0, 1.0])
    """

    changes: tuple[Change, ...] = ()

    @classmethod
    def window(
        cls, samples: Tensor | Sequence[int], start: int, length: int, weight: float | Tensor, tokens: int = 0
    ) -> Schedule:
        """``samples`` have ``weight`` during the ``length`` updates from ``start`` on, else 1; see :class:`Change`."""
        return cls((Change(start, start + length, torch.as_tensor(samples, dtype=torch.long), weight, tokens),))

    @classmethod
    def of_weights(cls, weights: Tensor, start: int, length: int) -> Schedule:
        """All samples have their ``weights (n,)``, or tokens ``(n, tokens)``, during ``length`` updates, else 1."""
        tokens = weights.shape[1] if weights.ndim == 2 else 0
        return cls.window(torch.arange(weights.numel()), start, length, weights.flatten(), tokens)

    @classmethod
    def whole_run(cls, samples: Tensor | Sequence[int], weight: float, tokens: int = 0) -> Schedule:
        """``samples`` have ``weight`` at every update, whenever the run starts and ends."""
        return cls.window(samples, WHOLE_RUN.start, len(WHOLE_RUN), weight, tokens)

    def weights(self, step: int, n: int) -> Tensor:
        """Weights of the ``n`` training samples in the update made at ``step``, float64.

        Returns:
            ``(n,)``, or ``(n, tokens)`` where some change is of tokens.

        Raises:
            ValueError: a change names a sample that does not exist, or changes count tokens differently.
        """
        per_sample = {change.tokens for change in self.changes if change.tokens}
        if len(per_sample) > 1:
            raise ValueError(f"changes count {sorted(per_sample)} tokens in a sample; expected one number")
        tokens = max(per_sample, default=0)
        weights = torch.ones((n, tokens) if tokens else (n,), dtype=torch.float64)
        for change in self.changes:
            there = n * (change.tokens or 1)
            outside = change.samples[(change.samples < 0) | (change.samples >= there)]
            if len(outside):
                what = "token" if change.tokens else "sample"
                raise ValueError(
                    f"a change names {what} {outside[0].item()}, but there are {there} of the training set"
                )
            if change.start <= step < change.stop:
                beta = torch.as_tensor(change.weight, dtype=torch.float64)
                (weights.view(-1) if change.tokens else weights)[change.samples] = beta
        return weights


@dataclass(frozen=True)
class BatchOrder:
    """Random batches without replacement: a new permutation every epoch, its incomplete last batch left out.

    A pure function of ``(seed, step)``, so that all replays see the same batches and a run can be
    continued from any checkpoint.

    Attributes:
        n: number of training samples.
        batch_size: samples per update; 0, None or anything from ``n`` on is the whole training set.
        seed: of the permutations.

    Example:
        >>> import stagewise as sw
        >>> order = sw.BatchOrder(6, batch_size=2)
        >>> sorted(sample for step in range(3) for sample in order(step).tolist())
        [0, 1, 2, 3, 4, 5]
    """

    n: int
    batch_size: int | None = None
    seed: int = 0

    def __call__(self, step: int) -> Tensor:
        """Indices ``(batch,)`` of the samples in the update made at ``step``."""
        if not self.batch_size or self.batch_size >= self.n:
            return torch.arange(self.n)
        epoch, batch = divmod(step, self.n // self.batch_size)
        return _permutation(self.n, self.seed, epoch)[batch * self.batch_size :][: self.batch_size]


@dataclass(frozen=True, eq=False)
class RecordedOrder:
    """The batches that a run has recorded, see :class:`stagewise.checkpoints.recorder.Recorder`.

    Attributes:
        first: number of updates made before the first of them.
        batches: indices ``(batch,)`` of the training samples of every update from there on; sizes may differ.

    Example:
        >>> import torch
        >>> order = RecordedOrder(10, (torch.tensor([4, 1]), torch.tensor([3])))
        >>> order(11).tolist()
        [3]
    """

    first: int
    batches: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError("expected the batches of one update or more, got none")

    def __call__(self, step: int) -> Tensor:
        """Indices ``(batch,)`` of the samples in the update made at ``step``.

        Raises:
            ValueError: that update is not among those recorded.
        """
        if not self.first <= step < self.first + len(self.batches):
            raise ValueError(
                f"the samples of the update made at step {step} are not known: the recorded ones are those of "
                f"{len(self.batches)} updates from step {self.first} on"
            )
        return self.batches[step - self.first]


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    # A seed sequence keeps the streams of neighbouring seeds and epochs apart.
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(state[0])))
