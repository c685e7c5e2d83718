"""Products with Jacobians by ordinary autograd, several at once.

All is reverse mode, as training is: what is hidden from ``backward()`` there is hidden here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stagewise.attention import slow_path
from stagewise.memory import out_of_memory


@contextmanager
def differentiable(u: Tensor) -> Iterator[Tensor]:
    """A leaf at ``u``, in a context in which what is computed from it can be differentiated, whatever the caller's."""
    with slow_path(), torch.inference_mode(False), torch.enable_grad():
        yield (u.clone() if u.is_inference() else u.detach()).requires_grad_()


def gradient(value: Tensor, leaf: Tensor, create_graph: bool = False) -> Tensor:
    """Gradient of a number; zero where it does not depend on the leaf."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    found = torch.autograd.grad(value, leaf, create_graph=create_graph, allow_unused=True)[0]
    return torch.zeros_like(leaf) if found is None else found


def pull(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool = True
) -> list[Tensor]:
    """Transposed Jacobian times k cotangents ``(k, *output)``: for every input ``(k, *input)``.

    All k share one backward pass where every operation can be batched. The graph is kept; without ``keep`` a single
    cotangent frees it on the way.
    """
    count = len(cotangents[0])
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not live:
        return [i.new_zeros(count, *i.shape) for i in inputs]
    kept = [o for o, _ in live]

    def backward(sides: Sequence[Tensor], batched: bool) -> list[Tensor]:
        held = keep or count > 1
        found = torch.autograd.grad(kept, inputs, sides, retain_graph=held, allow_unused=True, is_grads_batched=batched)
        lead = (count,) if batched else ()
        return [i.new_zeros(*lead, *i.shape) if f is None else f for f, i in zip(found, inputs, strict=True)]

    if count == 1:  # nothing to share, and what vmap keeps is not freed at once
        return [found[None] for found in backward([c[0] for _, c in live], False)]
    try:
        return backward([c for _, c in live], True)
    except RuntimeError as error:  # an operation without a batching rule
        if out_of_memory(error):
            raise
        single = [backward([c[k] for _, c in live], False) for k in range(count)]
        return [torch.stack(parts) for parts in zip(*single, strict=True)]


def push(outputs: Sequence[Tensor], leaf: Tensor, directions: Tensor) -> list[Tensor]:
    """Jacobian times k directions ``(k, parameters)``: for every output ``(k, *output)``.

    The product with the transposed Jacobian is linear in the cotangent, so that its own transpose is the Jacobian:
    reverse mode is all it takes, for every operation that can be differentiated twice.
    """
    probes = [torch.zeros_like(o, requires_grad=True) for o in outputs]
    live = [(o, p) for o, p in zip(outputs, probes, strict=True) if o.requires_grad]
    if not live:
        return [o.new_zeros(len(directions), *o.shape) for o in outputs]
    linear = torch.autograd.grad([o for o, _ in live], leaf, [p for _, p in live], create_graph=True)[0]
    return pull([linear], probes, [directions])
