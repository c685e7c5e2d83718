"""What a torch optimiser does and remembers, in this package's words. Optimisers are only ever looked at.

``names`` are the model's: they say which of the optimiser's parameters are its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from stagewise.checkpoint import Optimizer, ParameterGroup

Names = Mapping[Tensor, str]

# Variants of the update rules that an Optimizer has no word for.
_VARIANTS = ("nesterov", "dampening", "maximize", "amsgrad")
# What a checkpoint records once for the whole model, by rule.
_SHARED = {SGD: ("momentum",), Adam: ("betas", "eps", "decoupled_weight_decay"), AdamW: ("betas", "eps")}
# Classes that pass every call on to the optimiser in their attribute ``optimizer``; found by name, because
# accelerate and lightning are optional.
_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")


def unwrapped(optimizer: Any) -> Any:
    """The torch optimiser inside accelerate's or Lightning's."""
    while type(optimizer).__name__ in _WRAPPERS:
        optimizer = optimizer.optimizer
    return optimizer


def why_unrecorded(optimizer: Any, names: Names) -> str | None:
    """What keeps an optimiser from being recorded; None for plain SGD, Adam and AdamW with one rule for all."""
    kind = type(optimizer)
    if kind not in _SHARED:  # a subclass may well update in another way
        return f"{kind.__name__} is none of SGD, Adam and AdamW"
    settings = [(key, group.get(key)) for group in optimizer.param_groups for key in _VARIANTS]
    if variant := next((f"{key}={value}" for key, value in settings if value), None):
        return f"{kind.__name__}({variant}) is none of SGD, Adam and AdamW in their plain form"
    groups = _groups(optimizer, names)
    if not groups:
        return "the optimizer updates no parameter of this model; was it made for another?"
    for key in _SHARED[kind]:
        values = {_numbers(group.get(key)): None for group in groups}
        if len(values) > 1:
            return f"parameter groups disagree on {key}: {' and '.join(map(str, values))}"
    return None


def foreign(optimizer: torch.optim.Optimizer, names: Names) -> int:
    """Number of parameters that the optimiser updates and the model does not have."""
    return sum(parameter not in names for group in optimizer.param_groups for parameter in group["params"])


def describe(
    optimizer: torch.optim.Optimizer,
    names: Names,
    rates: Sequence[float],
    batch_size: int | None = None,
    clip_norm: float | None = None,
) -> Optimizer:
    """The update rule of an SGD, Adam or AdamW that nothing keeps from being recorded.

    Args:
        optimizer: it.
        names: the model's.
        rates: the learning rate of every parameter group, in their order.
        batch_size: samples per update.
        clip_norm: norm to which gradients are clipped.
    """
    updated: dict[tuple[float, float], list[str]] = {}
    sizes: Counter[tuple[float, float]] = Counter()
    for rate, group in zip(rates, optimizer.param_groups, strict=True):
        for parameter in _updated(optimizer, group, names):
            updated.setdefault((rate, float(group["weight_decay"])), []).append(names[parameter])
            sizes[rate, float(group["weight_decay"])] += parameter.numel()
    alike = len(updated) == 1 and len(next(iter(updated.values()))) == len(names)
    groups = [ParameterGroup(tuple(members), rate, decay) for (rate, decay), members in updated.items()]
    first = _groups(optimizer, names)[0]
    is_adam = isinstance(optimizer, Adam)
    return Optimizer(
        "adam" if is_adam else "sgd",
        of_most((rate, size) for (rate, _), size in sizes.items()),
        **{"betas": _numbers(first["betas"]), "eps": float(first["eps"])}
        if is_adam
        else {"momentum": float(first["momentum"])},
        weight_decay=of_most((decay, size) for (_, decay), size in sizes.items()),
        decoupled=isinstance(optimizer, AdamW) or bool(first.get("decoupled_weight_decay")),
        batch_size=batch_size,
        clip_norm=clip_norm,
        groups=() if alike else tuple(groups),
    )


def moments(optimizer: torch.optim.Optimizer, names: Names, *keys: str) -> dict[str, Tensor]:
    """What the optimiser remembers under any of the keys, by name, on the CPU.

    Parameters that never had a gradient are left out: torch makes their moments with their first.
    """
    return {
        names[parameter]: state[key].detach().cpu()
        for parameter, state in _memory(optimizer, names).items()
        for key in keys
        if state.get(key) is not None
    }


def zero_moments(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Tensor]:
    """The moments of an optimiser that has made no update yet."""
    return {names[parameter]: torch.zeros_like(parameter, device="cpu") for parameter in _memory(optimizer, names)}


def update_counts(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, int]:
    """How often Adam has updated each parameter, 0 for those that never had a gradient; SGD does not count."""
    if not isinstance(optimizer, Adam):
        return {}
    return {names[parameter]: int(state.get("step", 0)) for parameter, state in _memory(optimizer, names).items()}


def group_sizes(optimizer: torch.optim.Optimizer, names: Names) -> list[int]:
    """Number of the model's values that every parameter group updates."""
    return [sum(p.numel() for p in _updated(optimizer, group, names)) for group in optimizer.param_groups]


def of_most(sizes: Iterable[tuple[float, int]]) -> float:
    """The value that holds for most parameters, from pairs of value and number of parameters."""
    total: Counter[float] = Counter()
    for value, size in sizes:
        total[value] += size
    return max(total, key=lambda value: total[value])


def _groups(optimizer: torch.optim.Optimizer, names: Names) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if any(parameter in names for parameter in group["params"])]


def _updated(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], names: Names) -> list[Tensor]:
    """The model's parameters of a group, without the frozen ones: they get no gradient."""
    # Where everything is frozen just now, somebody is evaluating, and training will go on with all.
    trainable = any(p.requires_grad for g in optimizer.param_groups for p in g["params"] if p in names)
    return [p for p in group["params"] if p in names and (p.requires_grad or not trainable)]


def _memory(optimizer: torch.optim.Optimizer, names: Names) -> dict[Tensor, dict[str, Any]]:
    # Asked with [], optimizer.state would make an entry for a parameter it has not seen.
    return {p: optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"] if p in names}


def _numbers(value: Any) -> Any:
    """Settings as plain numbers: some may be tensors, for a schedule inside of a compiled step."""
    return tuple(float(part) for part in value) if isinstance(value, tuple | list) else value
