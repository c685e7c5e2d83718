"""What it costs to hold estimators against retraining, from a short window and a checkpoint of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stagewise.gauss_newton import gauss_newton_product
from stagewise.groups import query_groups
from stagewise.reporting import words
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.window_influence import window_influence
from stagewise.run.priced import duration
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.estimators import gradients
from stagewise.studies.runs import Runs, Settings
from stagewise.studies.timing import of_window, timed

_ITERATIONS = 10  # of conjugate gradients, about as many as the studies take


def exact(lab: Runs[Any], start: int, window: int) -> float:
    """Seconds of a window that is differentiated."""
    task, run = lab.task(0), lab.run(0)
    return of_window(lambda length: window_influence(task, run, window=length, steps=[start]), window)


def others(lab: Runs[Any], settings: Settings) -> dict[str, float]:
    """Seconds for one run, by what they are spent on, of all that exact influence is held against or beside.

    Chains are not tried: what they cost depends on the curvature at a checkpoint, and many they cannot answer at all.

    Args:
        lab: a short run with one window start.
        settings: of the study.
    """
    task, run, (start,) = lab.task(0), lab.run(0), lab.settings.window_starts
    again = of_window(lambda length: window_ablation(task, run, window=length, steps=[start]), settings.window)
    product, solved = timed(lambda: gradients(lab, 0)), _ITERATIONS * _curvature(lab, start)
    count = len(settings.window_starts)
    return {
        f"training {words.count(count, 'window')} in each again": len(settings.weights) * count * again,
        "products of gradients": count * product,
        f"damped influence at {words.count(len(settings.solved), 'checkpoint')} of each": (
            len(settings.solved) * (solved + product)
        ),
    }


def _curvature(lab: Runs[Any], start: int) -> float:
    """Seconds of a product with the curvature, for all queries."""
    part = lab.part(0)
    density = LocalPosterior(window=lab.settings.window).at(part, lab.run(0).load(start), curvature=False)
    product = gauss_newton_product(density, density.origin)
    vectors = torch.ones(len(query_groups(part)), density.vector.size)
    return timed(lambda: product(vectors))


def told(parts: Mapping[str, float], runs: int) -> str:
    """Predicted cost as text.

    Args:
        parts: seconds for one run, by what they are spent on.
        runs: how many.
    """
    lines = [f"{duration(runs * seconds):>14}  {what}" for what, seconds in parts.items()]
    lines.append(f"{'not priced':>14}  chains, in the first run")
    return "\n".join([f"time    about {duration(runs * sum(parts.values()))} of one processor:", *lines])
