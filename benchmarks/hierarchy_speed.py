"""Sampling the hierarchy study in stacks of chains, against a loop of single chains: ratios within one run.

    python benchmarks/hierarchy_speed.py

A loop of single chains is (a) this package with one chain per block, tuned and evaluated as the stack is, and (b) what
one would write by hand: a module, autograd, SGLD and the losses of every draw. All take the same number of steps and
draws at a few checkpoints of the aligned run; times are per chain, and those of single chains are measured on some.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import seconds
from torch import nn

from stagewise.checkpoint import Checkpoint
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalDensity, LocalPosterior
from stagewise.sampling.tuning import tune
from stagewise.studies.hierarchy.lab import Lab
from stagewise.task import Task

CHECKPOINTS, SINGLE_CHAINS = 4, 4
console = Console(width=110)


def by_hand(task: Task, checkpoint: Checkpoint, density: LocalDensity, steps: int, thinning: int) -> None:
    """One SGLD chain on a module, its losses at every draw and at the reflected point."""
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 15, bias=False))
    model.load_state_dict(dict(checkpoint.params))
    inputs, targets = task.train.batch(slice(None))
    weights = list(model.parameters())
    anchors = [w.detach().clone() for w in weights]
    epsilon = 0.4 / (density.gamma + density.n_beta)
    for step in range(steps):
        loss = task.loss(model, (inputs, targets)).mean()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, anchor, g in zip(weights, anchors, gradients, strict=True):
                w += -epsilon / 2 * (density.n_beta * g + density.gamma * (w - anchor))
                w += epsilon**0.5 * torch.randn_like(w)
            if step % thinning == 0:
                for sign in (1, -1):
                    for w, anchor in zip(weights, anchors, strict=True):
                        w.copy_(anchor + sign * (w - anchor))
                    for _ in ("training set", "queries"):
                        task.loss(model, (inputs, targets))
                for w, anchor in zip(weights, anchors, strict=True):
                    w.copy_(2 * anchor - w)


def per_chain(task: Task, checkpoint: Checkpoint, posterior: LocalPosterior, sampling: Chains) -> dict[str, float]:
    """Seconds of one chain at a checkpoint, in each way."""
    density = posterior.at(task, checkpoint)
    tuning = tune(density, sampling)
    steps = tuning.burn_in + sampling.draws * tuning.thinning
    single = replace(sampling, chains=1, batching="loop")
    singles = range(SINGLE_CHAINS)
    return {
        "stack": seconds(lambda: sample_block(task, checkpoint, posterior, sampling)) / sampling.chains,
        "single": seconds(lambda: [sample_block(task, checkpoint, posterior, single, k) for k in singles])
        / len(singles),
        "by hand": seconds(lambda: by_hand(task, checkpoint, density, steps, tuning.thinning)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        run, posterior, size = lab.aligned_float32, lab.window_posterior, lab.settings
        sampling = Chains(chains=size.chains, draws=size.draws, batching="stacked")
        chosen = lab.steps[:: len(lab.steps) // CHECKPOINTS][:CHECKPOINTS]
        spent = [per_chain(run.task, run.trajectory.load(step), posterior, sampling) for step in chosen]
        start = time.perf_counter()
        _ = lab.window_traces
        whole = (time.perf_counter() - start) / (len(lab.steps) * size.chains)
    mean = {way: sum(times[way] for times in spent) / len(spent) for way in spent[0]}
    rows = {
        f"all {len(lab.steps)} checkpoints, {size.workers} processes and their start, stored": whole,
        f"{size.chains} chains stacked": mean["stack"],
        "single chains, one after the other": mean["single"],
        "single chains, by hand": mean["by hand"],
    }
    title = f"{size.chains} chains x {size.draws} draws, {torch.get_num_threads()} threads"
    table = Table("per chain", "milliseconds", "times the stack", "times all", title=title)
    for name, value in rows.items():
        table.add_row(name, f"{1e3 * value:.1f}", f"{value / mean['stack']:.1f}", f"{value / whole:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
