"""What the study will cost, from short timings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from stagewise.reporting import words
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.window_influence import window_influence
from stagewise.run.estimator_cost import duration
from stagewise.studies.induction.arms import ARMS, decisions
from stagewise.studies.induction.classes import CLASSES
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.settings import FULL, Settings
from stagewise.studies.induction.training import EXCESS
from stagewise.studies.timing import of_window, timed

_SHORT = 12


def cost(settings: Settings = FULL) -> str:
    """Predicted cost as text; a few updates of each kind are made, in a temporary folder."""
    with TemporaryDirectory() as folder:
        update, exact, again, choice = _seconds(Path(folder), settings)
    starts, count = len(settings.window_starts), settings.seeds
    windows = sum(step + settings.window <= settings.last for step in settings.steps)
    parts = {
        f"training {words.count(count, 'run')}": settings.last * update,
        f"exact influence of {words.count(windows, 'window')} in each, and its control": 2 * windows * exact,
        f"training {words.count(starts, 'window')} in each again": len(settings.weights) * starts * again,
        # A gradient of every class over the whole training set.
        "products of gradients": starts * len(CLASSES) * settings.sequences / settings.batch_size * update,
        # At most: most of these runs begin where induction forms.
        f"training with other weights, in {words.count(len(ARMS), 'way')}": len(ARMS) * settings.until * update,
        "choosing those weights": (2 + len(decisions(settings))) * choice,
    }
    lines = [f"{duration(count * seconds):>14}  {what}" for what, seconds in parts.items()]
    return "\n".join([f"time    about {duration(count * sum(parts.values()))} of one processor:", *lines])


def _seconds(folder: Path, settings: Settings) -> tuple[float, float, float, float]:
    """Of an update, a window differentiated, a window with every class at another weight, a choice of weights."""
    lab = Lab(folder, replace(settings, last=_SHORT, every=_SHORT))
    task = lab.task(0)
    update = timed(lambda: lab.run(0)) / _SHORT
    run = lab.run(0)
    exact = of_window(lambda length: window_influence(task, run, window=length, steps=[0]), settings.window)
    again = of_window(lambda length: window_ablation(task, run, window=length, steps=[0]), settings.window)
    choice = of_window(
        lambda length: window_influence(task, run, window=length, steps=[0], queries=[EXCESS]), settings.window
    )
    return update, exact, again, choice
