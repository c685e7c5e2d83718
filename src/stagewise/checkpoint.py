"""One moment of a training run: the weights, and all that the next update depends on.

This is the ground of the package: it imports nothing from it.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or step and the reason."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimiser updates with a rate and a weight decay of their own.

    Attributes:
        names: of the parameters, as ``Module.named_parameters`` gives them.
        learning_rate: step size of the update that follows the checkpoint.
        weight_decay: coefficient of the L2 term or of the decoupled decay.
    """

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """The update rule a checkpoint was trained with: what a training window is made of.

    Attributes:
        name: ``"sgd"`` or ``"adam"`` (AdamW is Adam with ``decoupled=True``).
        learning_rate: step size of the update that follows the checkpoint; 0 in front of a warm-up. Where groups
            differ, that of most parameters.
        momentum: SGD's momentum, 0 if none.
        betas: Adam's decay rates of the two moments.
        eps: Adam's stability constant.
        weight_decay: coefficient of the L2 term (SGD, Adam) or of the decoupled decay (AdamW); where groups differ,
            that of most parameters.
        decoupled: weight decay acts on the weights (AdamW), not through the gradient.
        batch_size: samples per update if known (accumulation and devices counted); 0 means the whole training set,
            None unknown.
        clip_norm: the gradient of all trainable parameters is scaled down to this norm where it is longer, as
            ``torch.nn.utils.clip_grad_norm_`` does; None: it is not.
        groups: the parameters that are updated, with their rates and decays. Empty: every trainable parameter, with the
            rate and decay above.

    Example:
        >>> import stagewise as sw
        >>> adamw = sw.Optimizer("adam", 1e-3, weight_decay=0.01, decoupled=True, batch_size=32)
        >>> adamw.betas, adamw.group_of("weight").weight_decay
        ((0.9, 0.999), 0.01)
    """

    name: str
    learning_rate: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    batch_size: int | None = None
    clip_norm: float | None = None
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {self.name!r}")
        for rate in (self.learning_rate, *(group.learning_rate for group in self.groups)):
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"learning_rate must be finite and not negative, got {rate}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping, got {self.clip_norm}")

    @property
    def updated(self) -> frozenset[str] | None:
        """Names of the parameters that are updated; None: all that are trainable."""
        return frozenset(name for group in self.groups for name in group.names) if self.groups else None

    def group_of(self, name: str) -> ParameterGroup:
        """Rate and decay of one parameter; both are 0 if it is not updated."""
        if not self.groups:
            return ParameterGroup((name,), self.learning_rate, self.weight_decay)
        return next((group for group in self.groups if name in group.names), ParameterGroup((name,), 0.0))


@dataclass(frozen=True)
class Checkpoint:
    """The model, and what the optimiser remembered, after ``step`` updates.

    All tensors are copied, half precision is lifted to float32: training may go on, and arithmetic on the weights is
    never that of bfloat16.

    Attributes:
        step: number of updates made before this checkpoint was saved.
        params: parameters and persistent buffers by name, as ``state_dict`` has them.
        optimizer: the update rule, or None if it was not recorded.
        first_moment: raw (not bias-corrected) first moment or momentum buffer by parameter name. Where some parameters
            have one, those without have never had a gradient: theirs is 0.
        second_moment: raw second moment of Adam by parameter name; the same.
        update_counts: how often Adam has updated a parameter, where that is not ``step``, by parameter name: layers
            that were unfrozen late, a model that had been trained before.
        train_mode: kinds of layers that acted in train mode while the run was recorded, e.g. ``("Dropout",)``: its
            updates cannot be repeated exactly.
        learning_rates: of the updates that led here from the checkpoint recorded before, the last one made last, where
            they were recorded.
        coming_rates: of the updates that follow, as far as the run's later checkpoints know them; a trajectory fills
            them in. Where there are none, the optimiser's rate is held.
        batches: indices of the training samples ``(samples,)``, int64, of the updates that led here from the checkpoint
            recorded before, the last one made last; sizes may differ. Empty where they were not recorded.
        coming_batches: of the updates that follow, as far as the run's later checkpoints know them; a trajectory fills
            them in.
        estimated: the second moment is not what the run had, but an estimate, see
            :func:`stagewise.estimated_second_moment`.

    Example:
        >>> import torch, stagewise as sw
        >>> model = torch.nn.Linear(4, 1)
        >>> checkpoint = sw.Checkpoint(10, model.state_dict(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> checkpoint.step, sorted(checkpoint.params)
        (10, ['bias', 'weight'])
    """

    step: int
    params: Mapping[str, Tensor]
    optimizer: Optimizer | None = None
    first_moment: Mapping[str, Tensor] = field(default_factory=dict)
    second_moment: Mapping[str, Tensor] = field(default_factory=dict)
    update_counts: Mapping[str, int] = field(default_factory=dict)
    train_mode: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    coming_rates: tuple[float, ...] = ()
    batches: tuple[Tensor, ...] = ()
    coming_batches: tuple[Tensor, ...] = ()
    estimated: bool = False

    def __post_init__(self) -> None:
        for name in ("params", "first_moment", "second_moment"):
            object.__setattr__(self, name, {key: lifted(tensor) for key, tensor in getattr(self, name).items()})
        object.__setattr__(self, "batches", in_one_piece(self.batches))

    def followed_by(self, rates: Sequence[float], batches: Sequence[Tensor] = ()) -> Checkpoint:
        """The same, with the learning rates and the samples of the updates that follow."""
        known = copy.copy(self)  # and its digest, if that is known: it is of what stays
        object.__setattr__(known, "coming_rates", tuple(rates))
        object.__setattr__(known, "coming_batches", tuple(batches))
        return known

    def holding(self, **fields: Any) -> Checkpoint:
        """The same with other fields, whose tensors are taken as they are: of large models every copy counts."""
        known = copy.copy(self)
        vars(known).pop("digest", None)
        for name, value in fields.items():
            object.__setattr__(known, name, value)
        return known

    def changing_rates(self, window: int) -> tuple[float, ...]:
        """The known learning rates of the next ``window`` updates; none where they stay what they are."""
        coming, held = self.coming_rates[:window], self.optimizer.learning_rate if self.optimizer else None
        return () if all(rate == held for rate in coming) else coming

    @cached_property
    def digest(self) -> str:
        """Content hash of all that can change a number computed at this checkpoint, but for what comes after it."""
        named = {f"params/{name}": t for name, t in self.params.items()}
        named |= {f"first/{name}": t for name, t in self.first_moment.items()}
        named |= {f"second/{name}": t for name, t in self.second_moment.items()}
        facts = repr((self.step, self.optimizer, sorted(self.update_counts.items())))
        return tensors_digest(named, facts)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with other names; what ``names`` does not mention is left out."""

        def kept(values: Mapping[str, Any]) -> dict[str, Any]:
            return {names[name]: value for name, value in values.items() if name in names}

        optimizer = self.optimizer
        if optimizer is not None and optimizer.groups:
            groups = (replace(g, names=tuple(names[n] for n in g.names if n in names)) for g in optimizer.groups)
            optimizer = replace(optimizer, groups=tuple(groups))
        return self.holding(
            params=kept(self.params),
            optimizer=optimizer,
            first_moment=kept(self.first_moment),
            second_moment=kept(self.second_moment),
            update_counts=kept(self.update_counts),
        )


def lifted(tensor: Tensor) -> Tensor:
    """A copy that nobody else can change, in float32 where it was of lower precision."""
    low = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.detach().to(torch.float32 if low else tensor.dtype, copy=True)


def in_one_piece(batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of indices as int64 on the CPU, in one piece of memory: there may be as many as updates."""
    if not batches:
        return ()
    whole = torch.cat([batch.detach().to("cpu", torch.int64) for batch in batches])
    return torch.split(whole, [len(batch) for batch in batches])


def tensors_digest(tensors: Mapping[str, Tensor], facts: str = "") -> str:
    """Content hash of named tensors, independent of their order."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Type, shape and content of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return header + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
