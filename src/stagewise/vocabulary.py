"""Cross entropy over a large vocabulary, from hidden states, without its logits.

    l_t = log sum_v exp(z_tv) - z_ty,   z_t = W h_t + b

The logits z of all tokens may be larger than everything else together. Here those of a few tokens exist at a time, and
are computed again where a derivative needs them. Derivatives are written out, first and second:

    with cotangents c_t of the losses, p = softmax(z) and d_t = c_t (p_t - e_y):
        to h_t: W^T d_t        to W: sum_t d_t h_t^T        to b: sum_t d_t

    with cotangents a_t, A, s of these three, q_t = W a_t + A h_t + s and r_t = c_t p_t (q_t - p_t.q_t):
        to c_t: p_t.q_t - q_ty        to h_t: W^T r_t + A^T d_t
        to W: sum_t r_t h_t^T + d_t a_t^T        to b: sum_t r_t

because the sum of all cotangents times derivatives is  sum_t c_t (p_t.q_t - q_ty).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.function import once_differentiable

# Bytes of logits at a time, of which there are a few copies: large enough for matrix products at full speed.
_BYTES = 2**24
# Bytes of a product of matrices at a time, where it is added to others.
_ROWS_BYTES = 2**21


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Loss of every token, at least float32, twice differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: ``(..., width)``.
        weight: of the head ``(vocabulary, width)``.
        bias: of the head ``(vocabulary,)``, if it has one.
        targets: the tokens that came ``(...)``.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    bias = weight.new_zeros(()) if bias is None else bias
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    losses: Tensor = _Losses.apply(flat, weight.to(dtype), bias.to(dtype), targets.reshape(-1))[0]  # type: ignore[no-untyped-call]
    return losses.reshape(targets.shape)


def _tokens(weight: Tensor) -> int:
    """In a piece."""
    return max(1, _BYTES // (len(weight) * weight.element_size()))


def _pieces(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = _tokens(weight)
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _onto(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum, in place: its first part is a tensor of its own."""
    return part if total is None else total.add_(part)


def _product_onto(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """The same of a matrix product, of which a few rows exist at a time."""
    if total is None:
        return left @ right
    size = max(1, _ROWS_BYTES // (right.shape[1] * right.element_size()))
    for start in range(0, len(left), size):
        total[start : start + size] += left[start : start + size] @ right
    return total


def _room(hidden: Tensor, weight: Tensor, *others: Tensor) -> Tensor | None:
    """Where the logits of one piece after another are computed, and all that follows from them.

    A tensor for each would cost as much as what is computed in it: memory that is new to the process is slow, and what
    is freed in between is often no use for the next. None inside of ``vmap``, where nothing has a place.
    """
    if any(map(is_functorch_wrapped_tensor, (hidden, weight, *others))):
        return None
    return weight.new_empty(min(_tokens(weight), len(hidden)), len(weight))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, room: Tensor | None = None) -> Tensor:
    if room is None:
        logits = hidden @ weight.mT
        return logits + bias if bias.ndim else logits
    logits = torch.mm(hidden, weight.mT, out=room[: len(hidden)])
    return logits.add_(bias) if bias.ndim else logits


def _to_bias(slopes: Tensor, bias: Tensor) -> Tensor:
    return slopes.sum(0) if bias.ndim else torch.zeros_like(bias)


class _Losses(torch.autograd.Function):
    """Losses, and the logarithm of the sum of exponentials of every token's logits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, totals = [], []
        room = _room(hidden, weight, bias)
        for piece in _pieces(hidden, weight):
            logits = _logits(hidden[piece], weight, bias, room)
            came = logits.gather(1, targets[piece, None])[:, 0]
            totals.append(_logsumexp(logits))
            losses.append(totals[-1] - came)
            del logits  # before those of the next piece: pieces are what takes memory here
        return torch.cat(losses), torch.cat(totals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Slopes.apply(cotangent, *ctx.saved_tensors), None)  # type: ignore[no-untyped-call]


class _Slopes(torch.autograd.Function):
    """Cotangents of the losses to those of hidden states, weight and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cotangent: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        to_hidden, to_weight, to_bias = [], None, None
        room = _room(hidden, weight, bias, cotangent)
        for piece in _pieces(hidden, weight):
            shares = _shares(hidden[piece], weight, bias, totals[piece], room)
            slopes = _slopes(shares, cotangent[piece], targets[piece], in_place=room is not None)
            del shares
            to_hidden.append(slopes @ weight)
            to_weight = _product_onto(to_weight, slopes.mT, hidden[piece])
            to_bias = _onto(to_bias, _to_bias(slopes, bias))
            del slopes
        return torch.cat(to_hidden), torch.as_tensor(to_weight), torch.as_tensor(to_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor, weight_along: Tensor, bias_along: Tensor) -> tuple[Tensor | None, ...]:
        cotangent, hidden, weight, bias, targets, totals = ctx.saved_tensors
        to_cotangent, to_hidden, to_weight, to_bias = [], [], None, None
        everything = (hidden, weight, bias, cotangent, along, weight_along, bias_along)
        rooms = [_room(*everything) for _ in range(3)]
        in_place = rooms[0] is not None
        for piece in _pieces(hidden, weight):
            h, a, c, y = hidden[piece], along[piece], cotangent[piece], targets[piece, None]
            shares = _shares(h, weight, bias, totals[piece], rooms[0])
            change = _logits(a, weight, bias_along, rooms[1])
            other = _logits(h, weight_along, weight_along.new_zeros(()), rooms[2])
            if in_place:
                change.add_(other)
                mean = torch.mul(shares, change, out=other).sum(1)
                to_cotangent.append(mean - change.gather(1, y)[:, 0])
                bends = change.sub_(mean[:, None]).mul_(shares).mul_(c[:, None])
            else:
                change = change + other
                mean = (shares * change).sum(1)
                to_cotangent.append(mean - change.gather(1, y)[:, 0])
                bends = (change - mean[:, None]) * shares * c[:, None]
            slopes = _slopes(shares, c, y[:, 0], in_place)
            del change, other, shares
            to_hidden.append(bends @ weight + slopes @ weight_along)
            part = bends.mT @ h
            part = part.add_(slopes.mT @ a) if in_place else part + slopes.mT @ a
            to_weight = _onto(to_weight, part)
            to_bias = _onto(to_bias, _to_bias(bends, bias))
            del bends, slopes, part
        return torch.cat(to_cotangent), torch.cat(to_hidden), to_weight, to_bias, None, None


def _logsumexp(logits: Tensor) -> Tensor:
    """Of every row. It is computed in the place of the logits."""
    most = logits.amax(1)
    return logits.sub_(most[:, None]).exp_().sum(1).log_().add_(most)


def _shares(hidden: Tensor, weight: Tensor, bias: Tensor, totals: Tensor, room: Tensor | None = None) -> Tensor:
    """Probability of every word."""
    return _logits(hidden, weight, bias, room).sub_(totals[:, None]).exp_()


def _slopes(shares: Tensor, cotangent: Tensor, targets: Tensor, in_place: bool = False) -> Tensor:
    """Of the weighted losses, by logit: c (p - e)."""
    if in_place:
        return shares.mul_(cotangent[:, None]).scatter_add_(1, targets[:, None], -cotangent[:, None])
    slopes = shares * cotangent[:, None]
    del shares
    return slopes.scatter_add(1, targets[:, None], -cotangent[:, None])
