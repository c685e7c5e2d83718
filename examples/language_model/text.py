"""The text, the tokenizer, the model and its task: the part of your own project that stagewise needs to import."""

import _pydecimal
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import stagewise as sw

TEXT = Path(_pydecimal.__file__)  # any text file
LENGTH, WORDS, STEPS = 32, 400, 200
TRAIN, TEST = slice(0, 600), slice(600, 660)

Rows = list[dict[str, torch.Tensor]]


@cache
def passages() -> list[str]:
    """The text, cut at empty lines."""
    return [part for part in TEXT.read_text(encoding="utf-8").split("\n\n") if len(part) > 20]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, learnt from the text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=["<pad>"], initial_alphabet=letters)
    bpe.train_from_iterator(passages(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>")


def data(part: slice) -> Rows:
    """Passages as a Trainer takes them: cut and padded to one length, -100 where there is nothing to predict."""
    rows = tokenizer()(passages()[part], truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    names = ("input_ids", "attention_mask", "labels")
    return [{name: rows[name][k] for name in names} for k in range(len(rows["input_ids"]))]


def model() -> GPTNeoXForCausalLM:
    """Two layers, 126 thousand parameters, embeddings tied."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"max_position_embeddings": LENGTH, "tie_word_embeddings": True, "pad_token_id": 0}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=WORDS, **sizes, **more))


def labels(rows: Rows) -> np.ndarray:
    """What kind of token every predicted one is: (passages, tokens - 1)."""
    kinds = sw.token_kinds([row["input_ids"] for row in rows], lambda token: tokenizer().decode([token]))
    return sw.token_labels(kinds)


def texts(rows: Rows) -> list[list[str]]:
    """The text of every predicted token, up to the padding: shown in the report."""
    return [[tokenizer().decode([t]) for t in row["input_ids"][row["attention_mask"] > 0][1:]] for row in rows]


def task() -> sw.Task:
    """What is studied: named in config.yaml as `text.py:task`."""
    train, test = data(TRAIN), data(TEST)
    return sw.Task(
        model().eval(),
        sw.losses.causal_lm,
        train=train,
        queries={"test": test},
        train_groups=labels(train),
        query_groups={"test": labels(test)},
        train_texts=texts(train),
        objective="tokens",  # the Trainer averages over all tokens of an update
    )
