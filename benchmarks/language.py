"""A small language model on Python's standard library, and the classes of its tokens: what benchmarks share."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional

CLASSES = (
    "word start",
    "word part",
    "newline",
    "spacing",
    "left delimiter",
    "right delimiter",
    "numeric",
    "other",
)


class Block(nn.Module):
    """Causal attention and a feed-forward network, each on a normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in self.project(self.norm1(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.narrow(functional.gelu(self.widen(self.norm2(x))))


class LanguageModel(nn.Module):
    """A transformer with learned positions; ``tied``: the head is the embedding."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, context: int, *, tied: bool, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
            for table in (self.embed.weight, self.place.weight, self.head.weight):
                nn.init.normal_(table, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def token_losses(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Loss of every token but the first, ``(batch, tokens - 1)``."""
    tokens = batch[0]
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def standard_library() -> str:
    """The source of Python's standard library, without its tests: a few million characters."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text("utf-8", "ignore") for path in sorted(folder.glob("*.py")))


def tokenised(text: str, vocabulary: int, length: int) -> tuple[Tensor, Tensor]:
    """Byte-level BPE trained on the text itself.

    Returns:
        Its sequences ``(sequences, length)``, and the class of every token of the vocabulary.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, decoder = ByteLevel(add_prefix_space=False), Decoder()
    trainer = BpeTrainer(vocab_size=vocabulary, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    names = [CLASSES.index(token_class(decoder.decode([tokenizer.id_to_token(k)]))) for k in range(vocabulary)]
    lines = tokenizer.encode_batch(text.splitlines(keepends=True))
    tokens = torch.tensor([token for line in lines for token in line.ids])
    return tokens[: len(tokens) // length * length].view(-1, length), torch.tensor(names)


def token_class(text: str) -> str:
    """What kind of token it is, by its own text."""
    bare = text.strip()
    if "\n" in text:
        return "newline"
    if not bare:
        return "spacing"
    if bare.isalpha():
        return "word start" if text.startswith(" ") else "word part"
    if bare.isdigit():
        return "numeric"
    if bare[-1] in "([{":
        return "left delimiter"
    return "right delimiter" if bare[0] in ")]}" else "other"


def class_loss(number: int) -> Any:
    """Token losses of sequences that come with the class of every predicted token, of one class alone."""

    def loss(model: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return token_losses(model, batch), (batch[1] == number).float()

    return loss
