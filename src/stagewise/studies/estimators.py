"""Influence between classes of tokens by estimators that look at the checkpoint alone, and at a part of the data."""

from __future__ import annotations

from typing import Any

import xarray as xr

from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.influence.trusted import NoTrustedCheckpointError
from stagewise.retraining.window_influence import window_influence
from stagewise.run.engine import sample
from stagewise.sampling.chains import Chains
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.effects import SCORES, of_classes, scores
from stagewise.studies.runs import Runs
from stagewise.traces.diagnostics import diagnose_run

CHAINS = Chains(chains=4, draws=32, batch_size=8, reflect=False)


def gradients(lab: Runs[Any], seed: int) -> xr.Dataset:
    """Products of gradients where the settings' windows begin, scaled for the length of a window.

    Returns:
        ``value`` ``(step, train, query)``, nats per unit weight of one token of the part; see
        :func:`stagewise.gradient_product`.
    """
    posterior, starts = LocalPosterior(window=lab.settings.window), lab.settings.window_starts
    return lab.kept("gradients", seed, lambda: gradient_product(lab.part(seed), lab.run(seed), posterior, steps=starts))


def damped(lab: Runs[Any], seed: int) -> xr.Dataset:
    """Damped influence by Gauss-Newton curvature at some of those checkpoints; see :func:`stagewise.damped_influence`.

    Returns:
        As for :func:`gradients`.
    """
    settings = lab.settings

    def compute() -> xr.Dataset:
        posterior = LocalPosterior(window=settings.window)
        return damped_influence(lab.part(seed), lab.run(seed), posterior, steps=settings.solved, tolerance=1e-2)

    return lab.kept("damped", seed, compute)


def chains(lab: Runs[Any], seed: int, apart: bool) -> xr.Dataset:
    """Whether chains can answer short windows at some of those checkpoints, and what exact influence says of it.

    Args:
        lab: the runs.
        seed: which run.
        apart: only pairs of different classes.

    Returns:
        ``verdict`` and ``advice`` ``(step)``, see :func:`stagewise.diagnose_run`; where chains can be trusted,
        ``correlation`` and ``slope`` of exact influence on theirs, else NaN.
    """
    return lab.kept("chains", seed, lambda: _chains(lab, seed, apart))


def _chains(lab: Runs[Any], seed: int, apart: bool) -> xr.Dataset:
    settings = lab.settings
    posterior = LocalPosterior(window=settings.sampled_window)
    folder = lab.folder / f"chains-seed-{seed}"
    store = sample(lab.part(seed), lab.run(seed), posterior, out=folder, sampling=CHAINS, steps=settings.sampled)
    said = diagnose_run(store)[["verdict", "advice"]]
    try:
        found = bif(store)
    except NoTrustedCheckpointError:
        return said.assign(dict.fromkeys(SCORES, said["step"] * float("nan")))
    steps = found["step"].values.tolist()
    real = window_influence(lab.task(seed), lab.run(seed), window=settings.sampled_window, steps=steps)
    agreed = scores(of_classes(found), of_classes(real), apart).reindex(step=said["step"])
    return said.assign({name: agreed[name] for name in SCORES})
