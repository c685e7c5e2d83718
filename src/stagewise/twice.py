"""Layers by their definition, where their own kernels cannot be differentiated twice, or are so wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


def differentiate_twice(module: nn.Module) -> None:
    """Give a layer of our own the forward pass that its definition says.

    The second derivatives of weight norm's kernel are wrong; ``EmbeddingBag`` has none.
    """
    if isinstance(module, _WeightNorm):
        module.forward = partial(_normed, dim=module.dim)  # type: ignore[method-assign]
    # A gradient scaled by how often a word is in the batch is none of this loss.
    if isinstance(module, nn.EmbeddingBag) and not module.scale_grad_by_freq and _is_plain(module):
        module.forward = partial(_bags, module)  # type: ignore[method-assign]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            hook.compute_weight = partial(_hooked, name=hook.name, dim=hook.dim)  # type: ignore[method-assign]


def _is_plain(module: nn.EmbeddingBag) -> bool:
    """Whether it has no forward pass of its own."""
    return type(module).forward is nn.EmbeddingBag.forward


def _normed(weight_g: Tensor, weight_v: Tensor, dim: int) -> Tensor:
    return weight_v * (weight_g / torch.norm_except_dim(weight_v, 2, dim))


def _hooked(module: Any, name: str, dim: int) -> Tensor:
    return _normed(getattr(module, f"{name}_g"), getattr(module, f"{name}_v"), dim)


def _bags(
    module: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    """Sum, mean or maximum of the rows of every bag: a row of ``input``, or what lies between ``offsets``."""
    words = input.reshape(-1)
    if offsets is None:
        count = len(input)
        bag = torch.arange(count, device=words.device).repeat_interleave(input.shape[1])
    else:
        offsets = offsets[:-1] if module.include_last_offset else offsets
        count = len(offsets)
        bag = torch.searchsorted(offsets, torch.arange(len(words)).to(offsets), right=True) - 1
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    if module.padding_idx is not None:
        here = words != module.padding_idx
        words, bag, weights = words[here], bag[here], None if weights is None else weights[here]
    rows = functional.embedding(words, module.weight)
    rows = rows if weights is None else rows * weights[:, None]
    empty = rows.new_zeros(count, rows.shape[1])
    if module.mode == "max":
        return empty.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)
    total = empty.index_add(0, bag, rows)
    return total if module.mode == "sum" else total / torch.bincount(bag, minlength=count).clamp(min=1)[:, None]


def once_only(error: Exception) -> bool:
    """Whether it says that an operation can be differentiated once and not twice."""
    return "derivative" in str(error) and "not implemented" in str(error)


@contextmanager
def second_derivatives(whose: str, instead: str) -> Iterator[None]:
    """Where an operation has none, say so.

    Raises:
        ValueError: with what needs them, and what to use instead.
    """
    try:
        yield
    except RuntimeError as error:
        if not once_only(error):
            raise
        raise ValueError(f"{whose} needs operations with second derivatives: {error}; {instead}") from error
