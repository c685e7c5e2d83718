"""What the study will cost, from short timings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from stagewise.reporting import words
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.window_influence import window_influence
from stagewise.run.cost import duration
from stagewise.studies.induction.classes import CLASSES
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.settings import FULL, Settings


def cost(settings: Settings = FULL) -> str:
    """Predicted cost as text; a few updates of each kind are made, in a temporary folder."""
    with TemporaryDirectory() as folder:
        update, exact, again, boosted = _seconds(Path(folder), settings)
    last, window, starts = settings.last, settings.window, len(settings.window_starts)
    windows = sum(step + window <= last for step in settings.steps)
    parts = {
        f"training {words.count(settings.seeds, 'run')}": last * update,
        f"exact influence of {windows} windows in each, and its control": 2 * windows * window * exact,
        f"training {words.count(starts, 'window')} again": len(settings.weights) * starts * window * again,
        # A gradient of every class over the whole training set.
        "products of gradients": starts * len(CLASSES) * settings.sequences / settings.batch_size * update,
        "training with more weight": (last - min(settings.boost_starts)) * boosted,
    }
    total = settings.seeds * sum(parts.values())
    lines = [f"{duration(settings.seeds * seconds):>14}  {what}" for what, seconds in parts.items()]
    return "\n".join([f"time    about {duration(total)} in one process:", *lines])


def _seconds(folder: Path, settings: Settings) -> tuple[float, float, float, float]:
    """Of an update: in plain training, differentiated, with a class at another weight, and of all boosted runs."""
    short = replace(settings, last=3, every=3)
    lab = Lab(folder, short)
    task = lab.task(0)
    plain = _timed(lambda: lab.run(0)) / short.last
    run, order = lab.run(0), BatchOrder(short.sequences, short.batch_size, 0)
    runs = [Schedule()] * (1 + 2 * len(short.boost_starts))
    window_ablation(task, run, window=1, steps=[1])  # what is checked when a task meets a run, is checked once
    return (
        plain,
        _timed(lambda: window_influence(task, run, window=1, steps=[1])),
        _timed(lambda: window_ablation(task, run, window=1, steps=[1])),
        _timed(lambda: retrain(task, run.load(0), runs, order, [short.last])) / short.last,
    )


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
