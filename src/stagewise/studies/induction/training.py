"""The training set, the task on it, and a run with its checkpoints.

A recipe for this network draws fresh sequences for every update. Influence is of training data that have names, so that
here the set is fixed, and so large that a run sees each sequence about three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagewise.checkpoints.recorder import Recorder
from stagewise.evaluate import spread_rows
from stagewise.retraining.schedule import BatchOrder
from stagewise.studies.chance import Labels
from stagewise.studies.induction.chains import draw
from stagewise.studies.induction.classes import token_classes
from stagewise.studies.induction.network import loss, network
from stagewise.studies.induction.rules import bigram
from stagewise.studies.induction.settings import Settings
from stagewise.studies.induction.stages import Probes
from stagewise.studies.measures import divergence
from stagewise.task import Task

LOSS = "loss"
"""The query set whose tokens are labelled by their class: a class is called ``"loss:induction"``, and so on."""

EXCESS = "excess"
"""The query set of all tokens: what the network expects to lose beyond the least possible, see :func:`excess`."""

_AT_ONCE = 256  # an attention pattern of 100 tokens takes 40 kB


@dataclass(frozen=True, eq=False)
class Data:
    """What all runs of a study share.

    Attributes:
        train: sequences ``(n, length)``.
        classes: of the predicted tokens of those ``(n, length - 1)``.
        probes: what networks are measured on; other sequences.
        queries: of the probes' sequences, those whose losses are influenced.
        query_classes: of their predicted tokens.
    """

    train: Tensor
    classes: Labels
    probes: Probes
    queries: Tensor
    query_classes: Labels

    @classmethod
    def of(cls, settings: Settings) -> Data:
        """Drawn by the settings' seed."""
        generator = torch.Generator().manual_seed(settings.data_seed)
        n, vocabulary = settings.sequences, settings.vocabulary
        tokens = draw(n + settings.probes, settings.length, vocabulary, generator).tokens
        train, others = tokens[:n], tokens[n:]
        queries = others[: settings.queries]
        return cls(
            train,
            token_classes(train, vocabulary),
            Probes.of(others, vocabulary, generator),
            queries,
            token_classes(queries, vocabulary),
        )


def task(data: Data, settings: Settings, seed: int, part: int | None = None) -> Task:
    """The task of one run.

    Its training tokens are grouped by class. Its query sets hold the same sequences: :data:`LOSS`, the mean loss of the
    tokens of each class, and :data:`EXCESS`.

    Args:
        data: what all runs share.
        settings: sizes.
        seed: of the initial weights.
        part: training sequences that stand for all, evenly spaced; None: all.
    """
    rows = slice(None) if part is None else spread_rows(part, len(data.train))
    return Task(
        # The last token of a sequence is predicted only.
        network(settings.vocabulary, settings.length - 1, settings.width, settings.heads, seed),
        loss,
        train=data.train[rows],
        train_groups=data.classes[rows],
        queries={LOSS: data.queries, EXCESS: (data.queries, bigram(data.queries, settings.vocabulary).float())},
        query_groups={LOSS: data.query_classes},
        query_losses={EXCESS: excess},
        objective="tokens",
        forward_batch=_AT_ONCE,
    )


def excess(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """KL(bigram rule || network) at every predicted token ``(batch, length - 1)``, nats.

    The expected loss, given the context, above that of the best predictor: the loss without the chance of which token
    came, by which ``induction`` and ``against`` are told apart.
    """
    tokens, rule = batch
    return divergence(rule, model(tokens[:, :-1]).log_softmax(-1))


def record(folder: Path, task: Task, settings: Settings, seed: int) -> None:
    """Train with Adam in an ordinary loop, and record it.

    Args:
        folder: of the checkpoints.
        task: its model holds the initial weights; it is not changed.
        settings: sizes and rates.
        seed: of the order of the batches.
    """
    order = BatchOrder(len(task.train), settings.batch_size, seed)
    model = task.pure.reference({})
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate)
    recorded = Recorder(folder, model, optimizer, settings.steps, batch_size=settings.batch_size)
    recorded(0)
    for step in range(settings.last):
        samples = order(step)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model, task.train.batch(samples)).mean())
        optimizer.step()
        recorded(step + 1, samples)
