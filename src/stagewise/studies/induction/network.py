"""A transformer of two layers of attention and nothing else: the least that can learn induction.

The first layer can move what the previous token was to every place, the second can look for places whose previous token
is the current one. All is written out in operations that can be differentiated twice and batched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS = 2


class Attention(nn.Module):
    """Causal attention whose keys are those of content plus those of distance.

        score[t, s] = query[t] . (key[s] + distance[t - s]) / sqrt(width of a head),  s <= t

    Args:
        width: of the residual stream, a multiple of ``heads``.
        heads: attention heads.
        length: most tokens of a sequence.
    """

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.distance = nn.Parameter(torch.empty(heads, length, width // heads))
        nn.init.normal_(self.distance, std=0.02)  # attention starts almost even over distances

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residual stream ``(batch, tokens, width)`` to what is added to it, and the attention of every head.

        Returns:
            ``(batch, tokens, width)``, and ``(batch, heads, tokens, tokens)``: row t sums to 1 over s <= t.
        """
        query, key, value = (self._by_head(part(x)) for part in (self.query, self.key, self.value))
        scores = (query @ key.mT + self._of_distance(query)) / query.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.out((pattern @ value).transpose(1, 2).flatten(2)), pattern

    def _by_head(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` to ``(batch, heads, tokens, width of a head)``."""
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, self.heads, -1).transpose(1, 2)

    def _of_distance(self, query: Tensor) -> Tensor:
        """``query[t] . distance[t - s]`` at ``[t, s]``; anything where s > t."""
        batch, heads, tokens, _ = query.shape
        # Products with falling distance, a column in front, and rows read anew one entry longer: each row moves on by
        # one against the last, and distances line up with places. It copies far less than a table of all t - s does.
        products = query @ self.distance[:, :tokens].flip(1).mT
        return functional.pad(products, (1, 0)).view(batch, heads, tokens + 1, tokens)[..., 1:, :]


class Network(nn.Module):
    """Embedding, two layers of attention with a norm in front of each, a last norm, and a linear map to logits.

    Args:
        vocabulary: number of tokens.
        length: most tokens of a sequence.
        width: of the residual stream.
        heads: attention heads of each layer.
    """

    def __init__(self, vocabulary: int, length: int, width: int, heads: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Attention(width, heads, length) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(LAYERS + 1))
        self.unembedding = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)`` of the token that follows each."""
        return self.with_patterns(tokens)[0]

    def with_patterns(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the attention of all layers ``(layers, batch, heads, tokens, tokens)``."""
        x, patterns = self.embedding(tokens), []
        for layer, norm in zip(self.layers, self.norms[:LAYERS], strict=True):
            change, pattern = layer(norm(x))
            x = x + change
            patterns.append(pattern)
        return self.unembedding(self.norms[LAYERS](x)), torch.stack(patterns)


def network(vocabulary: int, length: int, width: int, heads: int = 1, seed: int = 0) -> Network:
    """A network with initial weights of its own; the caller's random numbers are not moved on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(vocabulary, length, width, heads).eval()


def loss(model: Any, tokens: Tensor) -> Tensor:
    """Cross entropy of tokens 1 to length - 1 of every sequence ``(batch, length - 1)``, nats.

    Args:
        model: a :class:`Network`.
        tokens: ``(batch, length)``.
    """
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
