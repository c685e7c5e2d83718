"""A training run as an ordered sequence of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from stagewise.task import Task, tensors_digest


@dataclass(frozen=True)
class Optimizer:
    """The update rule a checkpoint was trained with: what a training window is made of.

    Attributes:
        name: ``"sgd"`` or ``"adam"`` (AdamW is Adam with ``decoupled=True``).
        learning_rate: step size of the update that follows the checkpoint.
        momentum: SGD's momentum, 0 if none.
        betas: Adam's decay rates of the two moments.
        eps: Adam's stability constant.
        weight_decay: coefficient of the L2 term (SGD, Adam) or of the decoupled decay (AdamW).
        decoupled: weight decay acts on the weights (AdamW), not through the gradient.
        batch_size: samples per update if known; 0 means the whole training set, None unknown.
    """

    name: str
    learning_rate: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {self.name!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class Checkpoint:
    """The model, and what the optimiser remembered, after ``step`` updates.

    Attributes:
        step: number of updates made before this checkpoint was saved.
        params: parameters and buffers by name, float32 or float64.
        optimizer: the update rule, or None if it was not recorded.
        first_moment: raw (not bias-corrected) first moment or momentum buffer by parameter name; empty if
            unknown.
        second_moment: raw second moment of Adam by parameter name; empty if unknown.
    """

    step: int
    params: Mapping[str, Tensor]
    optimizer: Optimizer | None = None
    first_moment: Mapping[str, Tensor] = field(default_factory=dict)
    second_moment: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Content hash of everything that can change a number computed at this checkpoint."""
        named = {f"params/{name}": t for name, t in self.params.items()}
        named |= {f"first/{name}": t for name, t in self.first_moment.items()}
        named |= {f"second/{name}": t for name, t in self.second_moment.items()}
        named["optimizer/" + repr(self.optimizer)] = torch.tensor(self.step)
        return tensors_digest(named)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Trajectory:
    """Ordered checkpoints of one training run, read one at a time.

    Attributes:
        steps: the recorded steps, ascending.
        load: reads the checkpoint of a step; raises ``CheckpointError`` with the reason if it cannot be used.
    """

    steps: tuple[int, ...]
    load: Callable[[int], Checkpoint]

    def __post_init__(self) -> None:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must ascend without repeats, got {self.steps}")

    @classmethod
    def from_checkpoints(cls, checkpoints: Iterable[Checkpoint]) -> Trajectory:
        """Checkpoints held in memory, e.g. from a short training run in a notebook."""
        by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}
        return cls(tuple(sorted(by_step)), by_step.__getitem__)

    @classmethod
    def from_directory(cls, path: str | Path) -> Trajectory:
        """A folder of checkpoints, in one of the layouts of :mod:`stagewise.checkpoints.directory`."""
        from stagewise.checkpoints.directory import scan

        files = scan(Path(path))
        return cls(tuple(files), partial(_read, files))


def _read(files: Mapping[int, Path], step: int) -> Checkpoint:
    """A function of this module, so that a trajectory can be sent to worker processes."""
    from stagewise.checkpoints.directory import read_checkpoint

    if step not in files:
        raise KeyError(f"no checkpoint of step {step}; there are {sorted(files)}")
    return read_checkpoint(files[step], step)


def check_fits(task: Task, checkpoint: Checkpoint, source: str | Path = "") -> None:
    """Refuse a checkpoint that is not of the task's model.

    Raises:
        CheckpointError: parameters are missing or have another shape.
    """
    where = f"checkpoint at step {checkpoint.step}" + (f" ({source})" if source else "")
    model = task.state()
    trainable = dict(task.model.named_parameters())
    if missing := [name for name in trainable if name not in checkpoint.params]:
        raise CheckpointError(f"{where} lacks parameter {_some(missing)}; is it of another model?")
    for name, tensor in checkpoint.params.items():
        if name not in model:
            raise CheckpointError(f"{where} has {name!r}, which the model does not; is it of another model?")
        if tensor.shape != model[name].shape:
            raise CheckpointError(
                f"{where}: {name!r} has shape {tuple(tensor.shape)}, the model expects {tuple(model[name].shape)}"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
