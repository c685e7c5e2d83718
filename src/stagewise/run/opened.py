"""A run that is about to be worked on: its task, checkpoints and folder looked at, its cells named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from stagewise.run.analysis import Analysis, Stage
from stagewise.run.before import look
from stagewise.run.cells_file import CellList
from stagewise.run.config import RunConfig, save_config
from stagewise.run.crew import Crew
from stagewise.run.engine import begin, prepare
from stagewise.run.estimators import NAMES, SAMPLED
from stagewise.run.executors import Local
from stagewise.run.executors.base import in_words
from stagewise.run.executors.local import expect_workers
from stagewise.run.folder import provenance
from stagewise.run.kept import Kept
from stagewise.run.preflight import preflight
from stagewise.run.progress import Progress
from stagewise.run.slices import Slice
from stagewise.run.source import trajectory_of
from stagewise.run.stages import RunWork, cells_of, stages
from stagewise.run.task_file import load_task
from stagewise.run.vouching import check_kept
from stagewise.task import Task
from stagewise.traces.files import write_text
from stagewise.usable import chosen_steps

FAILED = "failed"
"""Folder of what could not be computed, in words, by who tried last."""


@dataclass(frozen=True)
class OpenedRun:
    """What is to be done in a run folder.

    Attributes:
        config: what was asked for.
        task: what is studied.
        work: what workers need.
        crew: who computes cells.
        left_out: the estimators that cannot be computed, with the reasons.
    """

    config: RunConfig
    task: Task
    work: RunWork
    crew: Crew
    left_out: Mapping[str, str]

    @cached_property
    def analysis(self) -> Analysis:
        """What all results depend on; what is missing of them is computed by the crew."""
        work, kept = self.work, Kept(self.work.store, self.task)

        def fill(stage: Stage) -> None:
            self.crew.compute(cells_of(stage, kept))

        return Analysis(self.task, work.trajectory, work.config, work.usable, kept, self.crew.progress, fill)

    @cached_property
    def cells(self) -> list[Any]:
        """All that will be needed whatever comes out of them."""
        sure = [stage for stage in stages(self.analysis).values() if stage.sure]
        sampled = self.work.cells if SAMPLED in self.config.estimators else []
        return [*sampled, *(cell for stage in sure for cell in cells_of(stage, self.analysis.kept))]

    @contextmanager
    def alone(self, again: bool = True) -> Iterator[None]:
        """Work on the whole run, up to its report; try ``again`` what could not be computed.

        Raises:
            RunLockedError: somebody else works on it, or on a slice of it.
        """
        store = self.work.store
        with store.lock(), self._told("run"), _threads(self.config.executor.threads):
            self._save_settings()
            begin(self.work, self.task)
            if again:
                self.analysis.kept.forget_refusals()
            cells = CellList.of(self.cells)
            cells.write(store)
            yield
            store.remove(*store.names(FAILED))  # slices failed at what is computed by now
            replace(cells, reported=True).write(store)

    @contextmanager
    def beside_others(self, part: Slice) -> Iterator[None]:
        """Work on a slice of the cells.

        Raises:
            RunLockedError: somebody works on the whole run, or on the same slice.
            RunMismatchError: the others work on other cells.
        """
        store = self.work.store
        with store.lock(part.name), self._told(part.name):
            CellList.of(self.cells).agree(store)
            if not store.has("config.yaml"):  # what is there is of who began, and of the same cells
                self._save_settings()
            begin(self.work, self.task, sweep=False)  # others are writing
            yield

    def _save_settings(self) -> None:
        """What was asked for, for a resumed run."""
        store = self.work.store
        save_config(self.config, store.root / "config.yaml")
        write_text(store.root / "provenance.json", json.dumps(provenance(), indent=1))
        store.push("config.yaml", "provenance.json")

    @contextmanager
    def _told(self, who: str) -> Iterator[None]:
        """What went wrong, for who asks how the run stands."""
        store, failures = self.work.store, f"{FAILED}/{who}.txt"
        store.remove(failures)
        try:
            yield
        except Exception as error:
            (store.root / FAILED).mkdir(exist_ok=True)
            write_text(store.root / failures, in_words(error))
            store.push(failures)
            raise


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """As many threads in this process as in each worker, where that is said: the bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_run(config: RunConfig, progress: Progress) -> OpenedRun:
    """Look at all that a run needs before anything is computed.

    Raises:
        ValueError: the configuration, task, checkpoints or run folder cannot be used, with the reason.
    """
    if isinstance(config.executor, Local) and config.workers != 1:
        expect_workers(RunWork.__module__)
    make_task = partial(load_task, config.task, config.task_args)
    task = make_task()
    trajectory = trajectory_of(config.checkpoints, config.steps, config.clip_norm, config.batch_size)
    steps = chosen_steps(trajectory, config.steps)
    looked = look(task, trajectory, config.posterior, steps, SAMPLED in config.estimators)
    left_out = preflight(task, trajectory, config, list(looked[0]))
    possible = tuple(name for name in config.estimators if NAMES.get(name) not in left_out)
    prepared = prepare(task, trajectory, config.posterior, config.sampling, config.out, looked, make_task)
    check_kept(Kept(prepared.store, task), task, trajectory, prepared.usable)
    work = RunWork(**vars(prepared), config=config.model_copy(update={"estimators": possible}))
    return OpenedRun(config, task, work, Crew(work, task, config.executor, config.workers, progress), left_out)
