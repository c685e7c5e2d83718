"""The runs and measures that experiments of the study share, each made once and when needed."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.studies.induction.settings import FULL, Settings
from stagewise.studies.induction.stages import stages_along
from stagewise.studies.induction.training import Data, record, task
from stagewise.task import Task


class Lab:
    """Runs that differ in their seed, of initial weights and batch order, on one training set.

    Args:
        folder: where checkpoints are kept; a run that is there is not trained again.
        settings: how much is computed.
    """

    def __init__(self, folder: Path, settings: Settings = FULL) -> None:
        self.folder, self.settings = folder, settings
        self._tasks: dict[int, Task] = {}
        self._stages: dict[int, xr.Dataset] = {}

    @cached_property
    def data(self) -> Data:
        """Training set, probes and queries."""
        return Data.of(self.settings)

    def task(self, seed: int) -> Task:
        """The task of a run."""
        if seed not in self._tasks:
            self._tasks[seed] = task(self.data, self.settings, seed)
        return self._tasks[seed]

    def run(self, seed: int) -> Trajectory:
        """The checkpoints of a run.

        Raises:
            ValueError: the folder holds runs of other settings.
        """
        self._claim_folder()
        return record(self.folder / f"seed-{seed}", self.task(seed), self.settings, seed)

    def _claim_folder(self) -> None:
        """Write down what the folder's runs are made with, or refuse it: nothing in a checkpoint tells of the data."""
        said, own = self.folder / "settings.json", json.dumps(self.settings.of_a_run(), indent=1)
        if not said.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            said.write_text(own, encoding="utf-8")
        elif said.read_text(encoding="utf-8") != own:
            raise ValueError(f"{self.folder} holds runs of other settings, see {said.name}; choose another folder")

    def stages(self, seed: int) -> xr.Dataset:
        """The network's own stages at the checkpoints of a run."""
        if seed not in self._stages:
            self._stages[seed] = stages_along(self.task(seed), self.run(seed), self.data.probes)
        return self._stages[seed]
