"""The training set, the task on it, and a run with its checkpoints."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from stagewise.checkpoints.huggingface import RecorderCallback
from stagewise.evaluate import spread_rows
from stagewise.studies.chance import Labels
from stagewise.studies.language.classes import token_classes
from stagewise.studies.language.network import loss, network
from stagewise.studies.language.ngrams import NGrams
from stagewise.studies.language.settings import Settings
from stagewise.studies.language.stages import Probes
from stagewise.studies.language.text import Text
from stagewise.task import Task

LOSS = "loss"
"""The query set, whose tokens are labelled by their class."""

_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Data:
    """What all runs of a study share.

    Attributes:
        train: sequences ``(n, length)``.
        classes: of the predicted tokens of those ``(n, length - 1)``.
        probes: what networks are measured on; other sequences, of the same files.
        words: the text of every token.
    """

    train: Tensor
    classes: Labels
    probes: Probes
    words: list[str]

    @classmethod
    def of(cls, settings: Settings) -> Data:
        """The standard library in tokens; the settings' seed says which sequences are probes."""
        text = Text.of_library(settings.characters, settings.vocabulary, settings.length, settings.data_seed)
        generator = torch.Generator().manual_seed(settings.data_seed)
        sequences = text.sequences[torch.randperm(len(text.sequences), generator=generator)]
        others, train = sequences[: settings.probes], sequences[settings.probes :]
        classes = [token_classes(part, text.words, train) for part in (train, others)]
        rules = NGrams.of(train, settings.vocabulary)
        return cls(train, classes[0], Probes.of(others, classes[1], rules, generator), text.words)

    @property
    def digest(self) -> str:
        """Of all sequences: the library is another one with another version of Python."""
        return hashlib.sha256(torch.cat([self.train, self.probes.tokens]).numpy().tobytes()).hexdigest()


def task(data: Data, settings: Settings, seed: int, part: int | None = None) -> Task:
    """The task of one run.

    Training tokens and those of the queries are grouped by class, of the query set :data:`LOSS`.

    Args:
        data: what all runs share.
        settings: sizes.
        seed: of the initial weights.
        part: training sequences that stand for all, evenly spaced; None: all.
    """
    rows = slice(None) if part is None else spread_rows(part, len(data.train))
    queries = slice(settings.queries)
    return Task(
        network(settings.vocabulary, settings.length, settings.width, settings.layers, settings.heads, seed),
        loss,
        train=data.train[rows],
        train_groups=data.classes[rows],
        queries={LOSS: data.probes.tokens[queries]},
        query_groups={LOSS: data.probes.classes[queries]},
        objective="tokens",
        forward_batch=_AT_ONCE,
    )


def record(folder: Path, task: Task, settings: Settings, seed: int) -> None:
    """Train with a Trainer of Hugging Face, and record it.

    Args:
        folder: of the checkpoints.
        task: its model holds the initial weights; it is not changed.
        settings: sizes and rates.
        seed: of the order of the batches.
    """
    with _own_random_numbers(), TemporaryDirectory() as output:
        _train(folder, task, settings, seed, output)


def _train(folder: Path, task: Task, settings: Settings, seed: int, output: str) -> None:
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=settings.last,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.rate,
        warmup_steps=settings.warm_up,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    rows = [{"input_ids": row, "labels": row} for row in task.train.batch(slice(None))]
    recorder = RecorderCallback(folder, settings.steps)
    trainer = Trainer(task.pure.reference({}), arguments, train_dataset=rows, callbacks=[recorder])
    trainer.remove_callback(PrinterCallback)  # the study has its own progress
    trainer.train()


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """A Trainer seeds all of Python's, NumPy's and PyTorch's random numbers; the caller's go on as they were."""
    python, state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(state)  # noqa: NPY002
