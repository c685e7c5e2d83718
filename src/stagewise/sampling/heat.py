"""What minibatches add to the temperature of the chains, and the step at which that is little.

A minibatch's gradient differs from that of the training set, and every step shakes the chains by the difference as
well as by their own noise. The variances of the losses are then too large, by the share that
:meth:`Langevin.heating` gives. It shrinks with the step, and faster than in proportion once an epoch of minibatches is
short beside the chains' motion: over an epoch the differences cancel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from stagewise.ranks import ALONE, Alone
from stagewise.sampling.base import GradientFunction, Langevin

MAX_HEAT = 0.01
"""Share of the variance that may come from minibatches: less than the standard error of most estimates."""

_MINIBATCHES = 8
_SHORTER = 0.95


def epoch_correlation(n: int, size: int) -> Tensor:
    """Correlation of the differences of two minibatches 1, 2, ... steps apart ``(batches per epoch - 1,)``.

    They are drawn without replacement: those of one epoch are anticorrelated, by -size / (n - size), and two that are
    l steps apart are of one epoch with probability 1 - l / (batches per epoch).
    """
    epoch = n // size
    lags = torch.arange(1, epoch, dtype=torch.float64)
    return -(1 - lags / epoch) * size / max(n - size, 1)


def gradient_noise(gradient: GradientFunction, positions: Tensor, n: int, size: int, ranks: Alone = ALONE) -> float:
    """Largest variance of a minibatch gradient of U at ``positions (k, parameters)``, over directions.

    Args:
        gradient: of U on fresh minibatches.
        positions: where chains go.
        n: samples in the training set.
        size: samples in a minibatch.
        ranks: the processes that hold the vectors.
    """
    epoch = n // size
    minibatches = min(_MINIBATCHES, epoch) if epoch > 1 else _MINIBATCHES
    drawn = torch.stack([gradient(positions).potential for _ in range(minibatches)])
    differences = (drawn - drawn.mean(0)).flatten(0, 1).double()
    differences = differences[ranks.total((~torch.isfinite(differences)).sum(1)) == 0]
    if not len(differences):
        return 0.0
    freedom = len(differences) * (1 - 1 / minibatches)
    # Minibatches of one epoch differ from each other by more than from the mean.
    among = 1 - size / n if epoch > 1 else 1.0
    return among * ranks.squared_width(differences) / freedom


def quiet(sampler: Langevin, noise: float, fast: float, correlation: Tensor) -> Langevin:
    """The sampler with a step so short that minibatches add at most :data:`MAX_HEAT` to the variances."""
    while sampler.heating(noise, fast, correlation) > MAX_HEAT:
        sampler = replace(cast(Any, sampler), step_size=_SHORTER * sampler.step_size)
    return sampler
