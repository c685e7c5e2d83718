"""Layers that act differently in train mode. This is ground of the package: it imports nothing from it."""

from __future__ import annotations

import inspect
import re
from types import CodeType, FunctionType

from torch import nn

# Layers that behave differently, or keep state, in train mode.
MODE_DEPENDENT = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.RReLU,
)

# How strongly a layer acts in train mode is kept under such names; 0 means that it does not.
_STRENGTH = re.compile(r".*(drop|noise|jitter).*|p", re.IGNORECASE)


def acting_in_train_mode(model: nn.Module) -> tuple[str, ...]:
    """Kinds of layers that are in train mode and act differently there: sorted class names.

    A dropout of probability 0 and a normalisation without running statistics act the same in both modes and are not
    named. Of layers that are not torch's, those are named whose forward pass looks at ``self.training``, unless all
    that they call dropout, noise or jitter is 0.
    """
    return tuple(sorted({type(module).__name__ for module in model.modules() if module.training and _acts(module)}))


def _acts(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return bool(module.p > 0)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return bool(module.track_running_stats)
    if isinstance(module, nn.RReLU):
        return bool(module.lower < module.upper)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout > 0 and module.num_layers > 1)
    if not _looks_at_mode(type(module)):
        return False
    strengths = [value for name, value in vars(module).items() if _STRENGTH.fullmatch(name) and _is_number(value)]
    strengths += [child.p for child in module.children() if isinstance(child, nn.modules.dropout._DropoutNd)]
    return any(strength > 0 for strength in strengths) if strengths else True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _looks_at_mode(kind: type[nn.Module]) -> bool:
    """Whether the forward pass, or a method that it calls, reads ``self.training``.

    torch's own layers that do are known by name; the others only choose a faster path. Neither does a layer act
    differently that only asks whether to checkpoint activations.
    """
    todo, seen = ["forward"], set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        names = _names_read(kind, name)
        if "training" in names and "gradient_checkpointing" not in names:
            return True
        todo += names
    return False


def _names_read(kind: type[nn.Module], method: str) -> set[str]:
    """The names that a method of a class mentions, with those of the methods that it extends."""
    names: set[str] = set()
    for base in kind.__mro__:
        function = vars(base).get(method)
        function = inspect.unwrap(function) if callable(function) else None
        if not isinstance(function, FunctionType):
            continue
        if not function.__module__.startswith("torch."):
            names |= _names_in(function.__code__)
        if "super" not in names:
            break
    return names


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def in_train_mode(model: nn.Module) -> dict[str, nn.Module]:
    """Torch's own layers that are in train mode and act differently there, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if module.training and isinstance(module, MODE_DEPENDENT) and _acts(module)
    }
