"""The runs and measures that experiments of the study share, each made once and when needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.dynamics.stages import Transition
from stagewise.run.engine import NUMERICS_VERSION
from stagewise.run.folder import dataset_from_json, dataset_to_json
from stagewise.run.progress import Progress, silent
from stagewise.studies.induction.rules import divergence
from stagewise.studies.induction.settings import FULL, Settings
from stagewise.studies.induction.stages import induction, stages_along
from stagewise.studies.induction.training import Data, record, task
from stagewise.task import Task
from stagewise.traces.files import explain_read, write_text


class Lab:
    """Runs that differ in their seed, of initial weights and batch order, on one training set.

    Args:
        folder: where checkpoints and results are kept: what is there is not made again.
        settings: how much is computed.
        progress: called with (what, done, in all).
    """

    def __init__(self, folder: Path, settings: Settings = FULL, progress: Progress = silent) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self._tasks: dict[int, Task] = {}

    @property
    def seeds(self) -> range:
        """Of all runs."""
        return range(self.settings.seeds)

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
            write_text(said, own)  # half of it would be of other settings
        elif said.read_text(encoding="utf-8") != own:
            raise ValueError(f"{self.folder} holds runs of other settings, see {said.name}; choose another folder")

    def kept(self, name: str, seed: int, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """A result of one run that the folder keeps for these settings, else what ``compute`` gives, kept then.

        Args:
            name: of the result.
            seed: of the run.
            compute: may be interrupted; then nothing is kept.

        Raises:
            ValueError: the folder holds runs of other settings.
            RunFolderError: the file is damaged.
        """
        self._claim_folder()
        cause = {**self.settings.as_plain(), "seeds": None, "numerics": NUMERICS_VERSION}
        key = hashlib.sha256(json.dumps(cause, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / "results" / f"{name}-seed-{seed}-{key}.json"
        if path.exists():
            with explain_read(self.folder, f"results/{path.name}"):
                return dataset_from_json(json.loads(path.read_text(encoding="utf-8")))
        result = compute()
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(dataset_to_json(result)))
        return result

    def told(self, what: str, seed: int) -> Callable[[int, int], None]:
        """Progress of one piece of work of one run."""
        return lambda done, total: self.progress(f"{what}, seed {seed}", done, total)

    def stages(self, seed: int) -> xr.Dataset:
        """The network's own stages at the checkpoints of a run."""
        return self.kept("stages", seed, lambda: stages_along(self.task(seed), self.run(seed), self.data.probes))

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
