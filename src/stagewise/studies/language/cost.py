"""What the study will cost, from short timings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stagewise.evaluate import chunks
from stagewise.gauss_newton import gauss_newton_product
from stagewise.reporting import words
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.window_influence import window_influence
from stagewise.run.estimator_cost import duration
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.language.classes import CLASSES
from stagewise.studies.language.influence import gradients
from stagewise.studies.language.lab import Lab
from stagewise.studies.language.settings import FULL, Settings
from stagewise.studies.timing import of_window, timed
from stagewise.task import Task

_SHORT, _START = 24, 4
_ITERATIONS = 10  # of conjugate gradients, about as many as the study takes


def cost(settings: Settings = FULL) -> str:
    """Predicted cost as text; a few updates of each kind are made, in a temporary folder.

    Chains are not tried: what they cost depends on the curvature at a checkpoint, and many they cannot answer at all.
    """
    with TemporaryDirectory() as folder:
        lab = Lab(Path(folder), replace(settings, last=_SHORT, warm_up=1, checkpoints=2, window_starts=(_START,)))
        task, update = lab.task(0), timed(lambda: lab.run(0)) / _SHORT
        looked = timed(lambda: lab.stages(0)) / len(lab.settings.steps)
        run, window, steps = lab.run(0), settings.window, [_START]
        exact = of_window(lambda length: window_influence(task, run, window=length, steps=steps), window)
        again = of_window(lambda length: window_ablation(task, run, window=length, steps=steps), window)
        checked = timed(lambda: _evaluate(task))
        product = timed(lambda: gradients(lab, 0))
        solved = _ITERATIONS * _curvature(lab)
    windows, starts, count = len(settings.exact_starts), len(settings.window_starts), settings.seeds
    parts = {
        f"training {words.count(count, 'run')}": settings.last * update,
        f"looking at {words.count(len(settings.steps), 'checkpoint')} of each": len(settings.steps) * looked,
        f"exact influence of {words.count(windows, 'window')} in each, and its controls": windows * (exact + checked),
        f"training {words.count(starts, 'window')} in each again": len(settings.weights) * starts * again,
        "products of gradients": starts * product,
        "damped influence": len(settings.solved) * (solved + product),
    }
    lines = [f"{duration(count * seconds):>14}  {what}" for what, seconds in parts.items()]
    lines.append(f"{'not priced':>14}  chains, in the first run")
    return "\n".join([f"time    about {duration(count * sum(parts.values()))} of one processor:", *lines])


@torch.no_grad()
def _evaluate(task: Task) -> None:
    """What is looked at when a task meets a checkpoint for the first time."""
    for batch in chunks(task, task.train):
        task.losses({}, batch)


def _curvature(lab: Lab) -> float:
    """Seconds of a product with the curvature, for all queries."""
    density = LocalPosterior(window=lab.settings.window).at(lab.part(0), lab.run(0).load(_START), curvature=False)
    product = gauss_newton_product(density, density.origin)
    vectors = torch.ones(len(CLASSES), density.vector.size)
    return timed(lambda: product(vectors))
