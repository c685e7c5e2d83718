"""A checkpoint of this moment, of a model and an optimiser that are in memory. They are only looked at."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer
from stagewise.checkpoints import optimizers
from stagewise.checkpoints.models import names_of, state_of, unwrapped
from stagewise.checkpoints.updates import numbers, rates_of
from stagewise.layers import acting_in_train_mode


def snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int | None = None,
    clip_norm: float | None = None,
) -> Checkpoint:
    """The model and all that its next update depends on, now: what :class:`Recorder` would write, in memory.

    Args:
        step: number of updates made so far.
        model: the module; wrappers are taken off.
        optimizer: SGD, Adam or AdamW, with the learning rate of the next update: call it after ``scheduler.step()``.
        batch_size: samples per update (devices and accumulation counted), 0 for the whole training set.
        clip_norm: the norm to which the loop clips the gradient; None or 0 if it does not.

    Returns:
        A copy, on the CPU: training may go on.

    Raises:
        CheckpointError: the optimiser is none of these, or another model's.
        ValueError: ``step`` or ``clip_norm`` is negative.

    Example:
        >>> import torch, stagewise as sw
        >>> model = torch.nn.Linear(4, 1)
        >>> now = sw.snapshot(0, model, torch.optim.Adam(model.parameters(), lr=0.01), batch_size=32)
        >>> now.optimizer.name, now.optimizer.learning_rate, now.optimizer.batch_size
        ('adam', 0.01, 32)
    """
    if step < 0:
        raise ValueError(f"step is the number of updates made so far, got {step}")
    model, optimizer = unwrapped(model), optimizers.unwrapped(optimizer)
    names = names_of(model)
    if reason := optimizers.why_unrecorded(optimizer, names):
        raise CheckpointError(f"{reason}: what its next update does is not known")
    rates = numbers(rates_of(optimizer))
    rule = optimizers.describe(optimizer, names, rates, batch_size, check_clip_norm(clip_norm))
    bare = Checkpoint(step, state_of(model), train_mode=acting_in_train_mode(model))
    return with_memory(bare, optimizer, names, rule, in_use=True)


def with_memory(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, names: optimizers.Names, rule: Optimizer, in_use: bool
) -> Checkpoint:
    """A checkpoint with its update rule, and what the optimiser remembers.

    Args:
        checkpoint: the weights.
        optimizer: one that nothing keeps from being recorded.
        names: the model's.
        rule: what it does.
        in_use: whether it is known to be the one that trains the model, so that moments it lacks are 0.
    """
    step = checkpoint.step
    first = optimizers.moments(optimizer, names, "momentum_buffer", "exp_avg")
    second = optimizers.moments(optimizer, names, "exp_avg_sq")
    counts = optimizers.update_counts(optimizer, names)
    if step > 0 and not first and in_use and (rule.name == "adam" or rule.momentum):
        # Not to be mistaken for moments that were not recorded: this optimiser has made none yet.
        first = optimizers.zero_moments(optimizer, names)
        second = dict(first) if rule.name == "adam" else {}
    return replace(
        checkpoint,
        optimizer=rule,
        first_moment=first,
        second_moment=second,
        update_counts={name: count for name, count in counts.items() if count != step},
    )


def check_clip_norm(clip_norm: float | None) -> float | None:
    """The norm, or None where nothing is clipped: 0 by the convention of many loops, or infinity.

    Raises:
        ValueError: it is negative or NaN.
    """
    if clip_norm is not None and not clip_norm >= 0:
        raise ValueError(f"clip_norm must be positive, or None or 0 for no clipping, got {clip_norm}")
    return float(clip_norm) if clip_norm and math.isfinite(clip_norm) else None
