"""The cells of a run beside its chains: every estimator without chains, retraining, the replay, at every checkpoint.

A cell is known by the name of its stage and its step alone, from which any worker makes again what is to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stagewise.run.analysis import Analysis, Stage, ablation_stage, replay_stage, two_times_stage
from stagewise.run.config import RunConfig
from stagewise.run.estimators import NAMES, SAMPLED, influence_stage
from stagewise.run.first_order import first_order_stage
from stagewise.run.kept import Kept, RefusedError, ended
from stagewise.run.per import asked
from stagewise.run.progress import Progress, silent
from stagewise.run.vouching import vouch
from stagewise.run.work import Work
from stagewise.task import Task
from stagewise.varied import by_itself


@dataclass(frozen=True)
class StageCell:
    """One result of a stage.

    Attributes:
        stage: its name.
        step: the checkpoint; None for what depends on all of them.
        file: its name in the run folder, in which a hash of all that it depends on takes part.
    """

    stage: str
    step: int | None
    file: str

    def __str__(self) -> str:
        return self.stage if self.step is None else f"{self.stage} at step {self.step}"


@dataclass(frozen=True)
class RunWork(Work):
    """All that a worker needs to compute cells of any stage.

    Attributes:
        config: what is asked for, without the estimators that cannot be computed.
    """

    config: RunConfig

    def compute(self, task: Task, cell: Any, progress: Progress = silent) -> None:
        """One cell, into the run folder."""
        if not isinstance(cell, StageCell):
            super().compute(task, cell, progress)
            return
        digests, kept = (
            self.usable if cell.step is None else {cell.step: self.usable[cell.step]},
            Kept(self.store, task),
        )
        for step in digests:
            self.checkpoint(task, step)
        last = max(digests)
        vouch(kept, task, self.trajectory, {last: digests[last]})
        analysis = Analysis(task, self.trajectory, self.config, digests, kept, progress)
        with suppress(RefusedError):  # which is kept too: the reason is part of the answer
            # The stages behind it are not made: what a replay depends on is every checkpoint of the run, read anew.
            stage = next(stage for stage in _possible(analysis) if stage.name == cell.stage)
            analysis.result(stage, cell.step)

    def is_complete(self, cell: Any) -> bool:
        """Whether the run folder holds it, or the reason why it does not exist."""
        return ended(self.store, cell.file) if isinstance(cell, StageCell) else super().is_complete(cell)


def stages(analysis: Analysis) -> dict[str, Stage]:
    """All that workers can be asked for, by name."""
    return {stage.name: stage for stage in _possible(analysis)}


def cells_of(stage: Stage, kept: Kept) -> list[StageCell]:
    """Of all its steps, or the one of the whole run."""
    return [StageCell(stage.name, step, kept.file(stage.name, stage.key(step))) for step in stage.digests]


def _possible(analysis: Analysis) -> Iterator[Stage]:
    config, own = analysis.config, by_itself(analysis.task)
    per = asked(analysis.task, config)
    makers: list[Callable[[], Stage | None]] = []
    for name in (name for name in config.estimators if name in NAMES):
        makers.append(partial(influence_stage, analysis, name, per))
        if per != own:
            # Needed beside those of single samples or tokens where these have errors, as damped influence has.
            of_groups = partial(influence_stage, analysis, name, own)
            makers.append(of_groups if name == "damped" else partial(_perhaps, of_groups))
    if SAMPLED in config.estimators:
        makers += [partial(first_order_stage, analysis, of) for of in dict.fromkeys((own, per))]
        if own == per == "group":  # of single samples to show
            makers.append(partial(_perhaps, partial(first_order_stage, analysis, "sample")))
    makers += [partial(make, analysis) for make in (ablation_stage, replay_stage, two_times_stage)]
    for make in makers:
        with suppress(ValueError):  # said by whoever asks for its results
            if (stage := make()) is not None:
                yield stage


def _perhaps(make: Callable[[], Stage | None]) -> Stage | None:
    """A stage that is only needed if others give certain results."""
    stage = make()
    return None if stage is None else replace(stage, sure=False)
