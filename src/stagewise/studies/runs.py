"""Runs that differ in their seed, and what is measured on them: each is made once and when needed, and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.run.engine import NUMERICS_VERSION
from stagewise.run.folder import dataset_from_json, dataset_to_json
from stagewise.run.progress import Progress, silent
from stagewise.studies.measures import Numbers, along
from stagewise.task import Task
from stagewise.traces.files import explain_read, write_text


class Settings(Protocol):
    """What of a study's settings its runs depend on."""

    @property
    def seeds(self) -> int:
        """Number of runs."""
        ...

    @property
    def window(self) -> int:
        """Updates during which the weight of a class is changed."""
        ...

    @property
    def window_starts(self) -> tuple[int, ...]:
        """Checkpoints from which windows are trained again."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Of a class during a window that is trained again."""
        ...

    @property
    def part(self) -> int:
        """Training sequences that stand for all where an estimator looks at the checkpoint alone."""
        ...

    @property
    def solved(self) -> tuple[int, ...]:
        """Of the window starts, those that damped influence is asked about."""
        ...

    @property
    def sampled(self) -> tuple[int, ...]:
        """Of the window starts, those that chains are asked about."""
        ...

    @property
    def sampled_window(self) -> int:
        """Updates of a window that chains are asked about."""
        ...

    @property
    def last(self) -> int:
        """Number of updates."""
        ...

    def as_plain(self) -> dict[str, Any]:
        """By name, as JSON shows them."""
        ...

    def of_a_run(self) -> dict[str, Any]:
        """Those that checkpoints depend on."""
        ...


S = TypeVar("S", bound=Settings)


class Runs(ABC, Generic[S]):
    """Runs that differ in their seed, of initial weights and batch order, on one training set.

    Args:
        folder: where checkpoints and results are kept: what is there is not made again.
        settings: how much is computed.
        progress: called with (what, done, in all).
    """

    descriptions: Mapping[str, str]
    """What each measure is."""

    def __init__(self, folder: Path, settings: S, progress: Progress = silent) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self._tasks: dict[tuple[int, int | None], Task] = {}

    @abstractmethod
    def make_task(self, seed: int, part: int | None = None) -> Task:
        """The task of a run, whose model holds its initial weights.

        Args:
            seed: of the run.
            part: training sequences that stand for all, evenly spaced; None: all.
        """

    @abstractmethod
    def record(self, folder: Path, seed: int) -> None:
        """Train, and record it in ``folder``."""

    @abstractmethod
    def measured(self, model: Any) -> Numbers:
        """Measures of a network."""

    def about_data(self) -> dict[str, Any]:
        """What else checkpoints depend on, where data are not drawn by the settings alone."""
        return {}

    @property
    def seeds(self) -> range:
        """Of all runs."""
        return range(self.settings.seeds)

    def task(self, seed: int) -> Task:
        """The task of a run."""
        return self._task(seed, None)

    def part(self, seed: int) -> Task:
        """The same with a part of the training set, for estimators that look at a checkpoint alone."""
        return self._task(seed, self.settings.part)

    def _task(self, seed: int, part: int | None) -> Task:
        if (seed, part) not in self._tasks:
            self._tasks[seed, part] = self.make_task(seed, part)
        return self._tasks[seed, part]

    def run(self, seed: int) -> Trajectory:
        """The checkpoints of a run.

        Raises:
            ValueError: the folder holds runs of other settings.
        """
        self._claim_folder()
        folder = self.folder / f"seed-{seed}"
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}-partial")  # a killed recording must not pass for a whole one
            shutil.rmtree(partial, ignore_errors=True)
            self.record(partial, seed)
            partial.rename(folder)
        return Trajectory.from_directory(folder)

    def _claim_folder(self) -> None:
        """Write down what the folder's runs are made with, or refuse it: nothing in a checkpoint tells of the data."""
        said, own = self.folder / "settings.json", json.dumps(self.settings.of_a_run() | self.about_data(), indent=1)
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
        """All measures at every checkpoint of a run: variables ``(step)``."""
        return self.kept("stages", seed, lambda: self._along(seed))

    def _along(self, seed: int) -> xr.Dataset:
        return along(self.task(seed), self.run(seed), self.measured, self.descriptions)
