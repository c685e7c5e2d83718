"""A GPT-NeoX of Hugging Face, small, and what it says of a batch besides its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


def network(vocabulary: int, length: int, width: int, layers: int, heads: int, seed: int) -> nn.Module:
    """A network with initial weights of its own; the caller's random numbers are not moved on.

    Args:
        vocabulary: number of tokens.
        length: most tokens of a sequence.
        width: of the residual stream, a multiple of ``heads``.
        layers: of attention and feed-forward network, side by side as in GPT-NeoX.
        heads: attention heads of each.
        seed: of the weights.
    """
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "eager"  # tells its attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    model.train(False)
    return model


def logits_and_patterns(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(batch, tokens, vocabulary)`` of what follows each token, and the attention of all layers.

    Returns:
        Attention is ``(layers, batch, heads, tokens, tokens)``: row t sums to 1 over s <= t.
    """
    output = model(input_ids=tokens, output_attentions=True, use_cache=False)
    return output.logits, torch.stack(output.attentions)


def loss(model: Any, tokens: Tensor) -> Tensor:
    """Cross entropy of tokens 1 to length - 1 of every sequence ``(batch, length - 1)``, nats.

    A vocabulary of this size can be held; :func:`stagewise.losses.causal_lm` never does, and takes longer for it.
    """
    logits, targets = model(input_ids=tokens, use_cache=False).logits[:, :-1], tokens[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
