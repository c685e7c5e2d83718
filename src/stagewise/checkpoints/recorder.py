"""Saving checkpoints from a training loop, on a schedule."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.directory import make_folder, write_checkpoint
from stagewise.checkpoints.optimizers import (
    agreed,
    describe,
    moments,
    names_updated,
    unknown_rule,
    updates_made,
)


def log_spaced(last: int, count: int, first: int = 1) -> tuple[int, ...]:
    """Steps that grow by a constant factor, as stages of training tend to.

    Where the factor would round to repeated steps (early on), steps follow one another instead, so exactly
    ``count`` come back whenever there are that many between ``first`` and ``last``. Step 0 has no logarithm:
    add it in front, ``(0, *log_spaced(1000, 30))``.

    Returns:
        Ascending steps, among them ``first`` and ``last``.

    Raises:
        ValueError: unless ``1 <= first <= last`` and ``count >= 2``.
    """
    if not 1 <= first <= last:
        raise ValueError(f"log_spaced needs 1 <= first <= last, got first={first}, last={last}")
    if count < 2:
        raise ValueError(f"count must be at least 2, the first and the last step, got {count}")
    count = min(count, last - first + 1)
    spaced = np.rint(np.geomspace(first, last, count)).astype(int)
    return tuple(np.maximum(spaced, first + np.arange(count)).tolist())


def linear(last: int, every: int) -> tuple[int, ...]:
    """Steps ``0, every, 2 every, ...`` and ``last``, which is included even if it is no multiple.

    Raises:
        ValueError: ``last`` is negative or ``every`` not positive.
    """
    if last < 0 or every < 1:
        raise ValueError(f"linear needs last >= 0 and every >= 1, got last={last}, every={every}")
    return (*range(0, last, every), last)


def check_steps(steps: Iterable[int]) -> frozenset[int]:
    """The steps as a set.

    Raises:
        ValueError: there are none, or some are negative, repeated or no integers.
    """
    try:
        given = [operator.index(step) for step in steps]
    except TypeError as error:
        raise ValueError(f"steps must be integers, the numbers of updates made: {error}") from error
    if not given:
        raise ValueError("steps is empty: name at least one step to record, e.g. log_spaced(1000, 30)")
    if min(given) < 0:
        raise ValueError(f"steps must not be negative, got {min(given)}; step 0 is the state before training")
    if repeated := sorted(step for step, count in Counter(given).items() if count > 1):
        raise ValueError(f"steps are repeated: {repeated[:5]}")
    return frozenset(given)


class Recorder:
    """Saves the model, and what the optimiser remembers, at chosen steps of any training loop.

    ``step`` is the number of updates made so far::

        record = Recorder("checkpoints", model, optimizer, steps=(0, *log_spaced(1000, 30)))
        record(0)
        for step, batch in enumerate(batches, start=1):
            ...                       # loss.backward(), optimizer.step(), scheduler.step()
            record(step)

    Between the chosen steps a call costs next to nothing. It never changes the model, the optimiser or the
    state of a random generator, so a recorded run is the same run. A file of an earlier attempt at the same
    step is replaced.

    SGD (``momentum_buffer`` as first moment), Adam and AdamW (raw ``exp_avg`` and ``exp_avg_sq``) are
    recorded with their settings. Moments do not exist before the first update and are empty there. The
    learning rate is the optimiser's at the time of the call: after ``scheduler.step()``, that of the next
    update. Where a schedule has come down to 0, it is that of the last update. Where it is still 0, in front
    of a warm-up, and for any other optimiser, the weights are recorded alone, with a warning. Weight decay
    may differ between parameter groups: that of most parameters is recorded, with a warning.

    Args:
        directory: folder of the checkpoints, made if missing.
        model: the bare module, not its DDP or ``torch.compile`` wrapper, whose names differ; all of it in
            this process, not a shard.
        optimizer: the optimiser in use, or None to record weights alone.
        steps: which steps to save: :func:`log_spaced`, :func:`linear` or any integers.
        batch_size: samples per update, 0 for the whole training set, None if unknown.

    Raises:
        ValueError: steps are empty, negative or repeated; the optimiser does not update this model; its
            parameter groups have different learning rates, momenta, betas or eps.
        CheckpointError: the folder cannot be written to.
    """

    def __init__(
        self,
        directory: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        steps: Iterable[int],
        batch_size: int | None = None,
    ) -> None:
        self._steps = check_steps(steps)
        self._directory = make_folder(directory)
        self._model = model
        self._batch_size = batch_size
        self._optimizer = optimizer
        self._last_rate = 0.0
        if optimizer is not None:
            self._check(optimizer)

    def __call__(self, step: int) -> None:
        """Save if ``step``, the number of updates made so far, is one of the chosen ones.

        Raises:
            CheckpointError: the file cannot be written.
        """
        step = operator.index(step)  # a tensor is never `in` a set of integers
        if step in self._steps:
            write_checkpoint(self._directory, self._checkpoint(step))
        if self._optimizer is not None:
            self._last_rate = float(self._optimizer.param_groups[0]["lr"])

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        if not names_updated(optimizer, self._model):
            raise ValueError("the optimizer updates no parameter of this model; was it made for another?")
        if unknown := unknown_rule(optimizer):
            self._optimizer = None
            warnings.warn(
                f"{unknown} is none of SGD, Adam and AdamW in their plain form: weights are recorded without "
                "the optimizer and its moments, so windows in training steps cannot be used on them",
                stacklevel=3,
            )
        else:
            agreed(optimizer, "lr")
            describe(optimizer, learning_rate=1.0)

    def _checkpoint(self, step: int) -> Checkpoint:
        params = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        if self._optimizer is None:
            return Checkpoint(step, params)
        made = updates_made(self._optimizer)
        if made is not None and made != step:
            warnings.warn(
                f"the optimizer's own count of updates is {made - step:+d} from the recorder's step; pass "
                "the number of updates made so far, or the bias correction of its moments will be wrong",
                stacklevel=3,
            )
        rate = float(agreed(self._optimizer, "lr")) or self._last_rate
        if not rate:
            warnings.warn(
                f"the learning rate at step {step} is 0: recorded without the optimizer, "
                "so windows in training steps cannot be used there",
                stacklevel=3,
            )
        return Checkpoint(
            step,
            params,
            describe(self._optimizer, rate, self._batch_size) if rate else None,
            first_moment=moments(self._optimizer, self._model, "momentum_buffer", "exp_avg"),
            second_moment=moments(self._optimizer, self._model, "exp_avg_sq"),
        )
