"""What the study will cost, from short timings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from stagewise.reporting import words
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.window_influence import window_influence
from stagewise.run.estimator_cost import duration
from stagewise.studies.language.influence import gradients
from stagewise.studies.language.lab import Lab
from stagewise.studies.language.settings import FULL, Settings
from stagewise.studies.timing import of_window, timed

_SHORT = 6


def cost(settings: Settings = FULL) -> str:
    """Predicted cost as text; a few updates of each kind are made, in a temporary folder.

    Damped influence is not tried: how many iterations it takes depends on the checkpoint.
    """
    with TemporaryDirectory() as folder:
        short = replace(settings, last=_SHORT, warm_up=1, checkpoints=2, window_starts=(4,))
        lab = Lab(Path(folder), short)
        task, update = lab.task(0), timed(lambda: lab.run(0)) / _SHORT
        run = lab.run(0)
        looked = timed(lambda: lab.stages(0)) / len(short.steps)
        exact = of_window(lambda length: window_influence(task, run, window=length, steps=[4]), settings.window)
        again = of_window(lambda length: window_ablation(task, run, window=length, steps=[4]), settings.window)
        product = timed(lambda: gradients(lab, 0))
    starts, count = len(settings.window_starts), settings.seeds
    windows = len(settings.exact_starts)
    parts = {
        f"training {words.count(count, 'run')}": settings.last * update,
        f"looking at {words.count(len(settings.steps), 'checkpoint')} of each": len(settings.steps) * looked,
        f"exact influence of {words.count(windows, 'window')} in each, and its controls": windows * exact,
        f"training {words.count(starts, 'window')} in each again": len(settings.weights) * starts * again,
        "products of gradients": starts * product,
    }
    lines = [f"{duration(count * seconds):>14}  {what}" for what, seconds in parts.items()]
    return "\n".join([f"time    about {duration(count * sum(parts.values()))} in one process:", *lines])
