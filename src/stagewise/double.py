"""The user's code in float64, the casts that it asks for itself included: for comparisons that rounding would blur."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

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
        args, kwargs = tree_map(_double_type, (args, kwargs))
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors) and not name.endswith("_") and "out" not in kwargs:
            args, kwargs = doubled((args, kwargs))
        result = function(*args, **kwargs)
        self.failed |= isinstance(result, Tensor) and result.dtype in _LOW and result.requires_grad
        return result


def doubled(tree: Any) -> Any:
    """Tensors, in whatever containers, of lower precision to float64."""
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.dtype in _LOW else leaf, tree)


def _double_type(leaf: Any) -> Any:
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _LOW else leaf
