"""The optimiser's updates, as ``torch.optim`` makes them, as pure functions of stacked flat vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.retraining.schedule import LearningRate
from stagewise.vector import ParameterVector

_REMEDY = "save checkpoints with stagewise.Recorder, which stores the optimizer and its state beside the weights"


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Weights and optimiser memory of several runs, each ``(runs, parameters)``.

    Attributes:
        params: the weights.
        first_moment: SGD's momentum buffer or Adam's raw first moment; unused by SGD without momentum.
        second_moment: Adam's raw second moment; unused by SGD.
    """

    params: Tensor
    first_moment: Tensor
    second_moment: Tensor

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        vector: ParameterVector,
        runs: int = 1,
        device: torch.device | str | None = None,
    ) -> TrainingState:
        """``runs`` identical runs that continue from the checkpoint; at step 0 all moments are 0.

        Raises:
            ValueError: the checkpoint lacks the optimizer, or a moment that its optimizer needs.
        """
        optimizer = recorded_optimizer(checkpoint)
        params = vector.flatten(checkpoint.params).to(device)
        first = second = torch.zeros_like(params)
        if keeps_first_moment(optimizer) and checkpoint.step > 0:
            first = _moment("first moment", checkpoint.first_moment, checkpoint, vector)
        if keeps_second_moment(optimizer) and checkpoint.step > 0:
            second = _moment("second moment", checkpoint.second_moment, checkpoint, vector)
        return cls(*(part.to(params).repeat(runs, 1) for part in (params, first, second)))

    def checkpoint(
        self, step: int, optimizer: Optimizer, vector: ParameterVector, fixed: Mapping[str, Tensor]
    ) -> Checkpoint:
        """The first run after ``step`` updates, with the ``fixed`` tensors; copied to the CPU."""

        def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

        def named(stack: Tensor) -> dict[str, Tensor]:
            return copies(vector.unflatten(stack[0]))

        return Checkpoint(
            step,
            {**copies(fixed), **named(self.params)},
            optimizer,
            first_moment=named(self.first_moment) if keeps_first_moment(optimizer) else {},
            second_moment=named(self.second_moment) if keeps_second_moment(optimizer) else {},
        )


def update(
    optimizer: Optimizer, state: TrainingState, gradient: Tensor, step: int, learning_rate: LearningRate | None = None
) -> TrainingState:
    """One update of every run, as ``torch.optim.SGD``, ``Adam`` or ``AdamW`` makes it.

    Args:
        optimizer: the update rule (without nesterov, dampening or amsgrad).
        state: before the update.
        gradient: of each run's objective, ``(runs, parameters)``.
        step: number of updates made before this one, for Adam's bias correction.
        learning_rate: of the update made at ``step``; default: the optimizer's.

    Returns:
        The state after the update.

    Raises:
        ValueError: the learning rate is negative or not finite.
    """
    params, rate = state.params, _rate(optimizer, step, learning_rate)
    if optimizer.decoupled:
        params = params * (1 - rate * optimizer.weight_decay)
    elif optimizer.weight_decay:
        gradient = gradient + optimizer.weight_decay * params
    if optimizer.name == "sgd":
        # torch's first update copies the gradient; a buffer that starts at 0 does the same without a special
        # case.
        first = optimizer.momentum * state.first_moment + gradient
        return TrainingState(params - rate * first, first, state.second_moment)
    beta1, beta2 = optimizer.betas
    first = torch.lerp(state.first_moment, gradient, 1 - beta1)
    second = torch.addcmul(state.second_moment * beta2, gradient, gradient, value=1 - beta2)
    scale = _root(second) / (1 - beta2 ** (step + 1)) ** 0.5 + optimizer.eps
    params = torch.addcdiv(params, first, scale, value=-rate / (1 - beta1 ** (step + 1)))
    return TrainingState(params, first, second)


def _rate(optimizer: Optimizer, step: int, learning_rate: LearningRate | None) -> float:
    """The learning rate of one update; it may be 0, as at the start of a warm-up."""
    if learning_rate is None:
        return optimizer.learning_rate
    rate = float(learning_rate(step))
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(
            f"learning_rate({step}) is {rate}, expected a finite number >= 0; return the rate of the update made at "
            "that step"
        )
    return rate


def _root(second: Tensor) -> Tensor:
    """Square root with slope 0 at 0: that of a parameter which never had a gradient, and not 0 / 0."""
    zero = second == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, second).sqrt())


def recorded_optimizer(checkpoint: Checkpoint) -> Optimizer:
    """The update rule of a checkpoint.

    Raises:
        ValueError: it was not recorded.
    """
    if checkpoint.optimizer is None:
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} does not say which optimizer it was trained with, "
            f"and a window can only be retrained with the run's own updates; {_REMEDY}"
        )
    return checkpoint.optimizer


def keeps_first_moment(optimizer: Optimizer) -> bool:
    """Whether updates depend on a first moment: Adam, and SGD with momentum."""
    return optimizer.name == "adam" or optimizer.momentum != 0


def keeps_second_moment(optimizer: Optimizer) -> bool:
    """Whether updates depend on a second moment: Adam."""
    return optimizer.name == "adam"


def _moment(kind: str, moments: Mapping[str, Tensor], checkpoint: Checkpoint, vector: ParameterVector) -> Tensor:
    if missing := [name for name in vector.names if name not in moments]:
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} has no {kind} for {len(missing)} of "
            f"{len(vector.names)} parameters ({missing[0]!r}, ...), without which its training cannot be "
            f"continued; {_REMEDY}"
        )
    return vector.flatten(moments)
