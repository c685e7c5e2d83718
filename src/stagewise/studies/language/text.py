"""Text that every machine has, as tokens: the source of Python's standard library, and a tokenizer learnt from it."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """A text in tokens.

    Attributes:
        sequences: of tokens, in the order of the text ``(n, length)``; what is left at the end is left out.
        words: the text of every token, by its number.
    """

    sequences: Tensor
    words: list[str]

    @classmethod
    def of_library(cls, characters: int, vocabulary: int, length: int, seed: int) -> Text:
        """So many characters of the standard library in tokens of byte-level BPE, which is learnt from them.

        Raises:
            ValueError: the text has fewer characters, or too few pairs of them for the vocabulary.
        """
        files = standard_library(characters, seed)
        tokenizer = learnt(files, vocabulary)
        ids = [token for file in tokenizer.encode_batch(files) for token in file.ids]
        sequences = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        return cls(sequences, [tokenizer.decode([token]) for token in range(vocabulary)])


def standard_library(characters: int, seed: int) -> list[str]:
    """Modules of the standard library that are a single file, in an order drawn by the seed, up to so many characters.

    Raises:
        ValueError: there are not so many.
    """
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
    files, left = [], characters
    for number in order.tolist():
        text = paths[number].read_text(encoding="utf-8", errors="ignore")[:left]
        files.append(text)
        left -= len(text)
    if left:
        raise ValueError(f"expected {characters:,} characters in the standard library, got {characters - left:,}")
    return [text for text in files if text]


def learnt(files: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of these files.

    Raises:
        ValueError: they have too few pairs of characters for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(files, trainer)
    if (size := tokenizer.get_vocab_size()) != vocabulary:
        raise ValueError(f"expected a vocabulary of {vocabulary} tokens, got {size}; take more text or fewer tokens")
    return tokenizer
