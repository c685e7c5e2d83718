"""Is the model evaluated in float32? Whatever rounds weights rounds their displacements, which may be smaller than it.

All losses then move by what is rounded away, and covary; where settings are given by hand, nothing else would show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LowPrecision(TorchFunctionMode):
    """Context that notes what is computed from the parameters in less than float32.

    Attributes:
        found: the name of an operation, and its type; empty if there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad and result.dtype in (torch.bfloat16, torch.float16):
            self.found = f"{getattr(function, '__name__', function)} in {result.dtype}"
        return result
