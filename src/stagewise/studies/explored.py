"""The first run of a study of token classes, to look around in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xarray as xr

from stagewise.dynamics.events import events
from stagewise.dynamics.stages import Transition
from stagewise.results import DAMPED, EXACT, Results
from stagewise.run.analysis import mean_losses
from stagewise.run.folder import provenance
from stagewise.run.samples import described
from stagewise.studies.effects import trained_again
from stagewise.studies.estimators import chains, damped, gradients
from stagewise.studies.runs import Runs


def first_run(
    lab: Runs[Any],
    title: str,
    exact: xr.Dataset,
    stages: Sequence[Transition],
    apart: bool,
    in_two_times: xr.Dataset | None = None,
) -> Results:
    """What the experiments know of the first run; only its losses are computed, and kept.

    Args:
        lab: the runs.
        title: of the study.
        exact: exact influence of the classes in that run.
        stages: of the model.
        apart: agreement is of pairs of different classes, as in the experiments.
        in_two_times: influence in two times, where there is an experiment on it.
    """
    seed = lab.seeds[0]
    task, run, settings = lab.task(seed), lab.run(seed), lab.settings
    weight = min(settings.weights, key=lambda one: abs(one - 1))
    measured = trained_again(lab, seed).sel(weight=weight, drop=True)
    return Results(
        title=f"{title}: the first run",
        losses=lab.kept("losses", seed, lambda: mean_losses(task, run, run.steps)),
        diagnostics=chains(lab, seed, apart)[["verdict", "advice"]],
        influence=None,
        baselines={EXACT: exact, DAMPED: damped(lab, seed), "gradient product": gradients(lab, seed)},
        measured=measured.assign_attrs(weight=weight, window=settings.window),
        in_two_times=in_two_times,
        samples=described(task),
        events=events(exact),
        stages=stages,
        config=settings.as_plain(),
        provenance=provenance(),
    )
