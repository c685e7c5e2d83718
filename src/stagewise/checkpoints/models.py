"""A model as it is recorded: without its wrappers, under its own names. Models are only ever looked at."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_COMPILED = "_orig_mod"  # where torch.compile keeps the module it was given


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and ``torch.compile``, whatever their order."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get(_COMPILED), nn.Module):
            model = inner
        else:
            return model


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """The name of every parameter, tied ones once; those of layers compiled by themselves as if they were not."""
    return {parameter: _bare(name) for name, parameter in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, on the CPU: a copy on a GPU may not fit beside the training."""
    # Not by state_dict(), which runs hooks that belong to the model's owner.
    passing = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in passing}
    named = dict(model.named_parameters()) | buffers
    return {_bare(name): tensor.detach().cpu() for name, tensor in named.items()}


def _bare(name: str) -> str:
    return name.replace(f"{_COMPILED}.", "")
