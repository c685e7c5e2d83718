"""What a torch optimiser does and remembers, in this package's words. Optimisers are only ever looked at."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from stagewise.checkpoint import Optimizer

# Variants of the update rules that an Optimizer has no word for.
_VARIANTS = ("nesterov", "dampening", "maximize", "amsgrad")


def unknown_rule(optimizer: torch.optim.Optimizer) -> str | None:
    """What to call an update rule that cannot be described; None for plain SGD, Adam and AdamW."""
    name = type(optimizer).__name__
    if type(optimizer) not in (SGD, Adam, AdamW):  # a subclass may well update in another way
        return name
    settings = [(key, group.get(key)) for group in optimizer.param_groups for key in _VARIANTS]
    return next((f"{name}({key}={value})" for key, value in settings if value), None)


def describe(optimizer: torch.optim.Optimizer, learning_rate: float, batch_size: int | None = None) -> Optimizer:
    """The update rule of an SGD, Adam or AdamW, at the given learning rate.

    Raises:
        ValueError: parameter groups differ in anything but their weight decay.
    """
    if isinstance(optimizer, SGD):
        return Optimizer(
            "sgd",
            learning_rate,
            momentum=float(agreed(optimizer, "momentum")),
            weight_decay=_weight_decay(optimizer),
            batch_size=batch_size,
        )
    beta1, beta2 = agreed(optimizer, "betas")
    return Optimizer(
        "adam",
        learning_rate,
        betas=(float(beta1), float(beta2)),
        eps=float(agreed(optimizer, "eps")),
        weight_decay=_weight_decay(optimizer),
        decoupled=isinstance(optimizer, AdamW) or bool(optimizer.defaults.get("decoupled_weight_decay")),
        batch_size=batch_size,
    )


def agreed(optimizer: torch.optim.Optimizer, key: str) -> Any:
    """The setting that all parameter groups share.

    Raises:
        ValueError: they do not.
    """
    first, *others = (group[key] for group in optimizer.param_groups)
    for other in others:
        if other != first:
            raise ValueError(
                f"parameter groups disagree on {key}: {first} and {other}; a checkpoint records one for the "
                "whole model. Use the same in all groups, or pass optimizer=None to record weights alone"
            )
    return first


def names_updated(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[Tensor, str]:
    """The model's name of every parameter that the optimiser updates."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {p: names[p] for group in optimizer.param_groups for p in group["params"] if p in names}


def moments(optimizer: torch.optim.Optimizer, model: nn.Module, *keys: str) -> dict[str, Tensor]:
    """What the optimiser remembers under any of the keys, by parameter; empty before the first update."""
    # Asked with [], optimizer.state would make an entry for a parameter it has not seen.
    memory = {name: optimizer.state.get(p, {}) for p, name in names_updated(optimizer, model).items()}
    return {name: state[key] for name, state in memory.items() for key in keys if state.get(key) is not None}


def updates_made(optimizer: torch.optim.Optimizer) -> int | None:
    """Adam's own count of its updates; None before the first and for SGD, which does not count."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=None)


def _weight_decay(optimizer: torch.optim.Optimizer) -> float:
    """That of most parameters: biases and norms are often spared, and are few."""
    sizes: Counter[float] = Counter()
    for group in optimizer.param_groups:
        sizes[float(group["weight_decay"])] += sum(parameter.numel() for parameter in group["params"])
    decay = max(sizes, key=lambda value: sizes[value])
    if len(sizes) > 1:
        warnings.warn(
            f"weight decay differs by parameter group: {sorted(sizes)}; recorded {decay}, that of most parameters",
            stacklevel=2,
        )
    return decay
