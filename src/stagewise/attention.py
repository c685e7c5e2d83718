"""Attention that can be differentiated as often as needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def slow_path() -> Iterator[None]:
    """Context in which torch's attention layers keep to operations that can be differentiated.

    In eval mode they take a fused forward pass wherever they see no parameter that requires a gradient, and inside
    ``torch.func`` they see none.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Context in which attention is computed step by step: its fused kernels lack second and forward derivatives."""
    with slow_path(), sdpa_kernel(SDPBackend.MATH):
        yield
