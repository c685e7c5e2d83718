"""The runs and measures that experiments of the study share, each made once and when needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from stagewise.dynamics.stages import Transition
from stagewise.studies.language.settings import Settings
from stagewise.studies.language.stages import DESCRIBED, losses_of, stages, transitions
from stagewise.studies.language.training import Data, record, task
from stagewise.studies.measures import Numbers
from stagewise.studies.runs import Runs
from stagewise.task import Task


class Lab(Runs[Settings]):
    """Runs of the network on one text."""

    descriptions = DESCRIBED

    @cached_property
    def data(self) -> Data:
        """Training set and probes."""
        return Data.of(self.settings)

    def about_data(self) -> dict[str, Any]:
        """Which text it is."""
        return {"text": self.data.digest}

    def make_task(self, seed: int, part: int | None = None) -> Task:
        """The task of a run, or with a part of its training set."""
        return task(self.data, self.settings, seed, part)

    def record(self, folder: Path, seed: int) -> None:
        """Train."""
        record(folder, self.task(seed), self.settings, seed)

    def measured(self, model: Any) -> Numbers:
        """The network's own stages."""
        return stages(model, self.data.probes)

    def transitions(self, seed: int) -> list[Transition]:
        """The network's own stages in time."""
        return transitions(self.stages(seed))

    @cached_property
    def rules(self) -> dict[str, Numbers]:
        """What each rule loses on the probes, all tokens and every class, nats."""
        probes = self.data.probes
        rules = probes.rules.log_probabilities(probes.tokens)
        return {name: probes.of_class(losses_of(rule, probes.tokens)) for name, rule in rules.items()}
