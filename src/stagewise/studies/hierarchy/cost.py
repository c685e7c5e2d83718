"""What the study will cost, from short timings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stagewise.run.chains_cost import sampling_cost
from stagewise.sampling.chains import Chains
from stagewise.studies.hierarchy.lab import INSTANT_GAMMA, LOOSE_GAMMA, Lab
from stagewise.studies.hierarchy.settings import FULL, Settings


def cost(folder: Path, settings: Settings = FULL) -> str:
    """Predicted cost as text; one short training run is made, nothing is sampled."""
    lab = Lab(folder, settings)
    sampling = Chains(chains=settings.chains, draws=settings.draws, batching="stacked")
    posteriors = [lab.window_posterior, lab.posterior(INSTANT_GAMMA), lab.posterior(LOOSE_GAMMA)]
    run = lab.aligned_float32
    parts = [
        sampling_cost(run.task, run.trajectory, posterior, sampling, lab.steps, settings.workers)
        for posterior in posteriors
    ]
    total = replace(
        parts[0],
        stages=tuple(stage for part in parts for stage in part.stages),
        memory=max(part.memory for part in parts),
        disk=sum(part.disk for part in parts),
        steps=sum(part.steps for part in parts),
    )
    return (
        f"{total.text()}\nfor the three posteriors that are sampled at all checkpoints; two smaller ones, training, "
        "retraining, a sweep of settings and figures take about two minutes more on two cores"
    )
