"""Layers that act differently in train mode: dropout, batch statistics. One list, for whoever records or evaluates."""

from __future__ import annotations

from torch import nn

_MODE_DEPENDENT = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.RReLU,
)


def in_train_mode(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are in train mode and act differently there, by name.

    A dropout that drops nothing is not one of them, nor is a normalisation that keeps no running statistics: it uses
    those of its batch in either mode.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if module.training and isinstance(module, _MODE_DEPENDENT) and not _idle(module)
    }


def _idle(module: nn.Module) -> bool:
    return getattr(module, "p", None) == 0 or getattr(module, "track_running_stats", True) is False
