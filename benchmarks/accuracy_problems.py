"""Recorded runs whose local posterior samplers are held against: what the files of accuracy_per_gradient.py share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

import stagewise as sw
from stagewise.sampling import sample_block
from stagewise.sampling.posterior import LocalDensity
from stagewise.studies.digits import training as digit_run
from stagewise.studies.induction.classes import by_third
from stagewise.studies.induction.network import loss, network
from stagewise.studies.induction.settings import OBSERVED_SEQUENCES, REDUCED
from stagewise.studies.induction.training import Data, record

WINDOW, QUERIES = 30, "held-out"
# The study's network and data at half its width and a third of its length, whose Hessian can be diagonalised, and at a
# learning rate of which windows are localised from the plateau on.
MARKOV = replace(REDUCED, length=32, sequences=1024, queries=OBSERVED_SEQUENCES, rate=3e-4, last=1530, every=100)


class Problem(NamedTuple):
    """A run, and classes of samples or tokens whose mean losses are looked at: one row each ``(class, loss)``.

    Attributes:
        name: in words.
        task: with groups of its training set and of its one query set.
        run: the checkpoints.
        steps: those that are used.
        train: averages the flattened losses of the training set, float64.
        query: those of the query set.
        batch: samples of a minibatch.
        pairs: what the network is given, and what it should answer, of the samples of a batch.
    """

    name: str
    task: sw.Task
    run: sw.Trajectory
    steps: Sequence[int]
    train: Tensor
    query: Tensor
    batch: int
    pairs: Callable[[Any], tuple[Tensor, Tensor]]

    @property
    def labels(self) -> dict[str, object]:
        return {"train": self.task.train_groups, "queries": {QUERIES: self.task.label_sets[f"queries/{QUERIES}"]}}

    @property
    def batches(self) -> tuple[Any, Any]:
        """The whole training set, and the whole query set."""
        return self.task.train.batch(slice(None)), self.task.queries[QUERIES].batch(slice(None))


class Place:
    """The posterior of a problem at one checkpoint; n_beta is what the package's own pilot finds there."""

    def __init__(self, problem: Problem, step: int) -> None:
        self.problem, self.step, self.checkpoint = problem, step, problem.run.load(step)
        pilot = sample_block(
            problem.task, self.checkpoint, sw.LocalPosterior(window=WINDOW), sw.Chains(chains=2, draws=8)
        )
        if not pilot.attrs["localised"]:
            raise ValueError(f"{problem.name}: a window of {WINDOW} is not localised at step {step}; choose another")
        self.posterior = sw.LocalPosterior(window=WINDOW, n_beta=pilot.attrs["n_beta"])

    @cached_property
    def density(self) -> LocalDensity:
        return self.posterior.at(self.problem.task, self.checkpoint)

    @property
    def weight(self) -> float:
        """Of one sample, or token, in the exponent."""
        return self.density.n_beta / self.problem.train.shape[1]

    def losses(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Of all samples, or tokens, at one place ``(parameters,)``: training set and query set, flattened."""
        params = self.density.params(u)
        train, query = (self.problem.task.losses(params, batch).flatten() for batch in self.problem.batches)
        return train, query

    def classes(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of every class at ``u (place, parameters)``: ``(place, class)`` of both sets, float64."""
        with torch.no_grad():
            return self.means(*vmap(self.losses)(u))

    def means(self, train: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Of every class, from flattened losses ``(place, loss)``."""
        return train.double() @ self.problem.train.T, query.double() @ self.problem.query.T


def digits(folder: Path) -> Problem:
    """Handwritten digits, the full batch, Adam; classes are the digits."""
    digit_run.record(folder / "digits", 0, steps := (200, 400, 700))
    return _problem("digits", digit_run.task(), folder / "digits", steps, 400, lambda batch: batch)


def markov(folder: Path) -> Problem:
    """In-context Markov chains; classes are kinds of tokens in each third of a sequence."""
    data = Data.of(MARKOV)

    def task(rows: slice) -> sw.Task:
        return sw.Task(
            network(MARKOV.vocabulary, MARKOV.length - 1, MARKOV.width, MARKOV.heads),
            loss,
            train=data.train[rows],
            train_groups=by_third(data.classes[rows]),
            queries={QUERIES: data.queries},
            query_groups={QUERIES: by_third(data.query_classes)},
            objective="tokens",
        )

    record(folder / "markov", task(slice(None)), MARKOV, 0)
    # On the plateau, late in the transition and after it: windows that begin in between are not localised.
    steps = (500, 1000, 1500)
    few = task(slice(OBSERVED_SEQUENCES))
    return _problem("Markov chains", few, folder / "markov", steps, len(few.train), _next_tokens)


def _next_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[:, :-1], tokens[:, 1:]


def _problem(name: str, task: sw.Task, folder: Path, steps: Sequence[int], batch: int, pairs: Any) -> Problem:
    labels = task.train_groups, task.label_sets[f"queries/{QUERIES}"]
    return Problem(name, task, sw.Trajectory.from_directory(folder), steps, *map(_means, labels), batch, pairs)


def _means(labels: object) -> Tensor:
    names = np.array(labels).astype(str).ravel()
    rows = np.stack([names == name for name in sorted(set(names))])
    return torch.from_numpy(rows / rows.sum(1, keepdims=True))
