"""The user's code in float64, the casts that it asks for itself included: for comparisons that rounding would blur."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_OPERATORS = ("__matmul__", "__rmatmul__")


class InDouble(TorchFunctionMode):
    """Context in which float64 stays float64, and spreads to what it meets.

    Attributes:
        failed: whether something that depends on the parameters was of lower precision all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        function = Tensor.double if function in _CASTS else function
        name = getattr(function, "__name__", "")
        if name.startswith("__") and name not in _OPERATORS:
            return function(*args, **kwargs)
        spreads = not name.endswith("_") and "out" not in kwargs and _any_double((args, kwargs))
        args, kwargs = _over(_double if spreads else _double_type, (args, kwargs))
        result = function(*args, **kwargs)
        self.failed |= isinstance(result, Tensor) and result.dtype in _LOW and result.requires_grad
        return result


def doubled(tree: Any) -> Any:
    """Tensors, in whatever containers, of lower precision to float64."""
    return tree_map(_double, tree)


def _double(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.double() if leaf.dtype in _LOW else leaf
    return _double_type(leaf)


def _double_type(leaf: Any) -> Any:
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _LOW else leaf


def _over(change: Callable[[Any], Any], tree: Any) -> Any:
    """As torch's ``tree_map``, which takes more time than most of what is called here."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([_over(change, part) for part in tree])
    if kind is dict:
        return {key: _over(change, part) for key, part in tree.items()}
    return tree_map(change, tree) if isinstance(tree, tuple | list | dict) else change(tree)


def _any_double(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return tree.dtype == torch.float64
    if isinstance(tree, tuple | list):
        return any(map(_any_double, tree))
    return isinstance(tree, dict) and any(map(_any_double, tree.values()))
