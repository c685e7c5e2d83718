"""What the study will cost, from short timings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stagewise.evaluate import chunks
from stagewise.reporting import words
from stagewise.studies import pricing
from stagewise.studies.language.lab import Lab
from stagewise.studies.language.settings import FULL, Settings
from stagewise.studies.timing import timed
from stagewise.task import Task

_SHORT, _START = 24, 4


def cost(settings: Settings = FULL) -> str:
    """Predicted cost as text; a few updates of each kind are made, in a temporary folder."""
    with TemporaryDirectory() as folder:
        lab = Lab(Path(folder), replace(settings, last=_SHORT, warm_up=1, checkpoints=2, window_starts=(_START,)))
        task, update = lab.task(0), timed(lambda: lab.run(0)) / _SHORT
        looked = timed(lambda: lab.stages(0)) / len(lab.settings.steps)
        exact, others = pricing.exact(lab, _START, settings.window), pricing.others(lab, settings)
        checked = timed(lambda: _evaluate(task))
    windows, count = len(settings.exact_starts), settings.seeds
    parts = {
        f"training {words.count(count, 'run')}": settings.last * update,
        f"looking at {words.count(len(settings.steps), 'checkpoint')} of each": len(settings.steps) * looked,
        f"exact influence of {words.count(windows, 'window')} in each, and its controls": windows * (exact + checked),
        **others,
    }
    return pricing.told(parts, count)


@torch.no_grad()
def _evaluate(task: Task) -> None:
    """What is looked at when a task meets a checkpoint for the first time."""
    for batch in chunks(task, task.train):
        task.losses({}, batch)
