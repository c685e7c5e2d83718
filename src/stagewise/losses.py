"""Losses of language models, whose logits are never held for more than a few tokens at a time.

One of them is the loss of a task: ``sw.Task(model, sw.losses.causal_lm, train=tokens, queries={"val": other})``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stagewise.dtensors import is_sharded
from stagewise.vocabulary import token_losses

IGNORED = -100
"""The label of a token that does not count, as everywhere in PyTorch."""
_SPLIT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether the logits of a model are its head's of its base model's hidden states."""

_LOUDER = 1e4


def causal_lm(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The loss of every token but the first, given those before it: a loss for :class:`stagewise.Task`.

    Of a Hugging Face model the head is applied to a few tokens at a time, in the forward pass and in first and second
    derivatives: logits ``(tokens, vocabulary)`` are never in memory. Another module is called with ``input_ids``, and
    one that is sharded is called as a whole.

    Args:
        model: a causal language model of Hugging Face, or a module that returns logits ``(batch, tokens, vocabulary)``
            or an object with them as ``.logits``.
        batch: ``input_ids (batch, tokens)``, or a mapping with them and, if wanted, ``attention_mask`` (0 is padding)
            and ``labels`` (-100 is ignored; default ``input_ids``). What else it holds is handed to the model.

    Returns:
        Losses in nats ``(batch, tokens - 1)``, at least float32, and their weights: 0 for padding, for what
        follows padding and for ignored labels, 1 elsewhere.

    Raises:
        ValueError: the batch holds no ``input_ids``, or sequences of a single token.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
        >>> losses, weights = causal_lm(model, torch.tensor([[1, 2, 4], [0, 3, 3]]))
        >>> losses.shape, weights.sum().item()
        (torch.Size([2, 2]), 4.0)
    """
    inputs = _inputs(batch)
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    labels = inputs.pop("labels", tokens)[:, 1:]
    counted = labels != IGNORED
    if mask is not None:
        counted = counted & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    targets = torch.where(counted, labels, 0)
    head = _head(model)
    if head is not None and _is_split(model, head, inputs):
        hidden = _hidden(model, inputs)[:, :-1]
        values = token_losses(hidden, head.weight, head.bias, targets)
    else:
        logits = _logits(model, inputs)[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values = nn.functional.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
    return values, counted.to(values.dtype)


def _inputs(batch: Any) -> dict[str, Any]:
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if not isinstance(inputs.get("input_ids"), Tensor):
        got = sorted(map(str, inputs)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"causal_lm: expected a tensor of tokens (batch, tokens), or a mapping with input_ids, got {got}; pass "
            "rows of one length as a tensor, torch.tensor(rows), and others with Task(collate=...), which pads them"
        )
    if inputs["input_ids"].shape[-1] < 2:
        raise ValueError("causal_lm: expected sequences of two tokens or more: the first is not predicted")
    return inputs


def _is_huggingface(model: nn.Module) -> bool:
    return hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "base_model", None), nn.Module)


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs, use_cache=False) if _is_huggingface(model) else model(inputs["input_ids"])
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _head(model: Any) -> nn.Linear | None:
    """The layer that makes logits of hidden states, where there is one."""
    if not _is_huggingface(model) or model.base_model is model or is_sharded(model):
        return None  # the parts of a sharded model cannot be called alone
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward else None


def _hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    output = model.base_model(**inputs, use_cache=False)
    hidden: Tensor = output[0]
    return hidden


def _is_split(model: nn.Module, head: nn.Linear, inputs: dict[str, Any]) -> bool:
    """Whether hidden states and head are all there is: others scale or cap their logits. Seen once, on two tokens.

    The head answers much more loudly while it is looked at: a cap does not show where logits are small, as they are
    when training begins, and this is asked once for all checkpoints.
    """
    if model not in _SPLIT:
        few = {key: value[:1, :2] for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
        louder = head.register_forward_hook(lambda _module, _inputs, logits: _LOUDER * logits)
        try:
            with torch.no_grad():
                whole, apart = _logits(model, few), head(_hidden(model, few))
                _SPLIT[model] = torch.allclose(whole, apart, rtol=1e-4, atol=1e-5, equal_nan=True)
        except (RuntimeError, TypeError, AttributeError):
            return False  # inside of vmap, where values cannot be asked for, or a model of another form
        finally:
            louder.remove()
    return _SPLIT[model]
