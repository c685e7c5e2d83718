"""The optimiser's updates, as ``torch.optim`` makes them, as pure functions of stacked flat vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer
from stagewise.retraining.schedule import LearningRate
from stagewise.vector import ParameterVector

_REMEDY = (
    "save checkpoints with stagewise.Recorder, which stores the optimizer (SGD, Adam or AdamW in their plain form) and "
    "its state beside the weights"
)


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule, in terms of a vector of parameters.

    Attributes:
        optimizer: the rule (without nesterov, dampening or amsgrad).
        vector: the parameters that have gradients; with clipping these are more than are updated.
        updated: which of them are updated ``(names,)``.
        rates: their learning rates ``(names,)``, float64; 0 where a parameter is not updated.
        decays: their weight decays ``(names,)``, float64.
        first: the first update of ``coming``.
        coming: the run's own learning rates from there on, as far as they are known; the last one is held.
    """

    optimizer: Optimizer
    vector: ParameterVector
    updated: Tensor
    rates: Tensor
    decays: Tensor
    first: int = 0
    coming: tuple[float, ...] = ()

    @classmethod
    def of(cls, optimizer: Optimizer, vector: ParameterVector, first: int = 0, coming: tuple[float, ...] = ()) -> Rule:
        """The rule of an optimizer on the parameters of a vector."""
        groups, known = [optimizer.group_of(name) for name in vector.names], optimizer.updated
        return cls(
            optimizer,
            vector,
            torch.tensor([known is None or name in known for name in vector.names]),
            torch.tensor([group.learning_rate for group in groups], dtype=torch.float64),
            torch.tensor([group.weight_decay for group in groups], dtype=torch.float64),
            first,
            coming,
        )

    def rates_at(self, step: int, learning_rate: LearningRate | None) -> Tensor:
        """Learning rates of the update made at ``step`` ``(names,)``; groups scale with ``learning_rate``.

        Where all rates of the checkpoint are 0, as in front of a warm-up, every parameter has the one given.

        Raises:
            ValueError: the learning rate is negative or not finite, or nothing says how groups scale with it.
        """
        if learning_rate is None and self.coming:
            learning_rate = self._recorded_rate
        if learning_rate is None:
            return self.rates
        rate, usual = float(learning_rate(step)), self.optimizer.learning_rate
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(
                f"learning_rate({step}) is {rate}, expected a finite number >= 0; return the rate of the update made "
                "at that step"
            )
        if not self.rates.any():
            return self.updated.double() * rate
        if usual == 0:
            raise ValueError(
                "learning_rate gives the rate of most parameters, which is 0 at the checkpoint while other groups have "
                "another, so that theirs cannot be scaled with it; start from a later checkpoint"
            )
        return torch.where(self.rates == usual, rate, self.rates * (rate / usual))

    def _recorded_rate(self, step: int) -> float:
        return self.coming[min(step - self.first, len(self.coming) - 1)]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Weights and optimiser memory of several replays.

    Attributes:
        params: the weights ``(replays, parameters)``.
        first_moment: SGD's momentum buffer or Adam's raw first moment, alike; unused by SGD without momentum.
        second_moment: Adam's raw second moment, alike; unused by SGD.
        counts: how often Adam has updated each parameter ``(replays, names)``, float64, on the CPU.
    """

    params: Tensor
    first_moment: Tensor
    second_moment: Tensor
    counts: Tensor

    @classmethod
    def of(cls, checkpoint: Checkpoint, rule: Rule, params: Tensor, replays: int = 1) -> TrainingState:
        """``replays`` times the state of a checkpoint, whose weights are ``params (parameters,)``.

        Raises:
            ValueError: the checkpoint lacks all moments that its optimizer needs.
            CheckpointError: a moment has another shape than its parameter.
        """
        first = second = torch.zeros_like(params)
        if keeps_first_moment(rule.optimizer):
            first = _moment("first moment", checkpoint.first_moment, checkpoint, rule, params)
        if keeps_second_moment(rule.optimizer):
            second = _moment("second moment", checkpoint.second_moment, checkpoint, rule, params)
        made = [
            checkpoint.update_counts.get(name, checkpoint.step if name in checkpoint.second_moment else 0)
            for name in rule.vector.names
        ]
        counts = torch.tensor(made, dtype=torch.float64)
        return cls(*(part.repeat(replays, 1) for part in (params, first, second, counts)))


def update(
    rule: Rule,
    state: TrainingState,
    gradient: Tensor,
    step: int,
    learning_rate: LearningRate | None = None,
    used: Tensor | None = None,
) -> TrainingState:
    """One update of every replay, as ``torch.optim.SGD``, ``Adam`` or ``AdamW`` makes it.

    Args:
        rule: the update rule.
        state: before the update.
        gradient: of each replay's objective, ``(replays, parameters)``.
        step: number of updates made before this one.
        learning_rate: of the update made at ``step``; default: the optimizer's.
        used: which parameters the objective depends on ``(replays, names)``, default all. As in torch the others,
            which have no gradient, stay as they are: weight decay and moments too.

    Returns:
        The state after the update.

    Raises:
        ValueError: the learning rate is negative or not finite.
    """
    optimizer, vector = rule.optimizer, rule.vector
    if optimizer.clip_norm is not None:
        gradient = clipped(gradient, optimizer.clip_norm)
    params, rates, counts = state.params, rule.rates_at(step, learning_rate), state.counts + 1
    if optimizer.decoupled:
        params = params * _spread(vector, 1 - rates * rule.decays, gradient)
    elif rule.decays.any():
        gradient = gradient + _spread(vector, rule.decays, gradient) * params
    if optimizer.name == "sgd":
        # torch's first update copies the gradient; a buffer that starts at 0 does the same without a special
        # case.
        first = optimizer.momentum * state.first_moment + gradient
        after = TrainingState(params - _spread(vector, rates, gradient) * first, first, state.second_moment, counts)
    else:
        beta1, beta2 = optimizer.betas
        first = torch.lerp(state.first_moment, gradient, 1 - beta1)
        second = torch.addcmul(state.second_moment * beta2, gradient, gradient, value=1 - beta2)
        root = _spread(vector, (1 - beta2**counts).sqrt(), gradient)
        length = _spread(vector, rates / (1 - beta1**counts), gradient)
        params = params - length * (first / (_root(second) / root + optimizer.eps))
        after = TrainingState(params, first, second, counts)
    return after if used is None or bool(used.all()) else _where_used(vector, used, after, state)


def clipped(gradient: Tensor, norm: float) -> Tensor:
    """The gradients ``(replays, parameters)``, each no longer than ``norm``, as ``clip_grad_norm_`` scales them."""
    length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    scaled: Tensor = gradient * (norm / (length + 1e-6)).clamp(max=1.0)
    return scaled


def _where_used(vector: ParameterVector, used: Tensor, after: TrainingState, before: TrainingState) -> TrainingState:
    mask = vector.spread(used).to(after.params.device)
    params, first, second = (
        torch.where(mask, new, old)
        for new, old in (
            (after.params, before.params),
            (after.first_moment, before.first_moment),
            (after.second_moment, before.second_moment),
        )
    )
    return TrainingState(params, first, second, torch.where(used, after.counts, before.counts))


def _spread(vector: ParameterVector, values: Tensor, like: Tensor) -> Tensor:
    """One value for every name ``(..., names)``: one number where all are equal, else ``(..., parameters)``."""
    first = values.flatten()[0]
    same = bool((values == first).all())
    return (first if same else vector.spread(values)).to(like.dtype).to(like.device)


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


def _moment(kind: str, moments: Mapping[str, Tensor], checkpoint: Checkpoint, rule: Rule, params: Tensor) -> Tensor:
    """A moment ``(parameters,)``: 0 where others have one, and before the first update."""
    vector = rule.vector
    updated = [name for name, moves in zip(vector.names, rule.updated.tolist(), strict=True) if moves]
    if checkpoint.step > 0 and not any(name in moments for name in updated):
        raise ValueError(
            f"the checkpoint at step {checkpoint.step} has no {kind} for any of its {len(updated)} parameters "
            f"({updated[0]!r}, ...), without which its training cannot be continued; {_REMEDY}"
        )
    tensors = {}
    for name, shape in zip(vector.names, vector.shapes, strict=True):
        tensors[name] = moments[name].to(params) if name in moments else params.new_zeros(shape)
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"checkpoint at step {checkpoint.step}: the {kind} of {name!r} has shape "
                f"{tuple(tensors[name].shape)}, the parameter {shape}; is it of another model?"
            )
    return vector.flatten(tensors, like=params)
