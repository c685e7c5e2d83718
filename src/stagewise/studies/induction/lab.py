"""The runs and measures that experiments of the study share, each made once and when needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from stagewise.dynamics.stages import Transition
from stagewise.studies.induction.settings import Settings
from stagewise.studies.induction.stages import DESCRIBED, induction, stages
from stagewise.studies.induction.training import Data, record, task
from stagewise.studies.measures import Numbers, divergence
from stagewise.studies.runs import Runs
from stagewise.task import Task


class Lab(Runs[Settings]):
    """Runs of the network on one set of sequences."""

    descriptions = DESCRIBED

    @cached_property
    def data(self) -> Data:
        """Training set, probes and queries."""
        return Data.of(self.settings)

    def make_task(self, seed: int, part: int | None = None) -> Task:
        """The task of a run, or with a part of its training set."""
        return task(self.data, self.settings, seed, part)

    def record(self, folder: Path, seed: int) -> None:
        """Train."""
        record(folder, self.task(seed), self.settings, seed)

    def measured(self, model: Any) -> Numbers:
        """The network's own stages."""
        return stages(model, self.data.probes)

    def transition(self, seed: int) -> Transition | None:
        """When a run learns induction; None if it does not."""
        try:
            return induction(self.stages(seed))
        except ValueError:
            return None

    @cached_property
    def plateau(self) -> float:
        """What the unigram rule expects to lose beyond the least possible on the queries, nats."""
        rules, n = self.data.probes.rules, len(self.data.queries)
        return float(divergence(rules["bigram"][:n], rules["unigram"][:n]).mean())
