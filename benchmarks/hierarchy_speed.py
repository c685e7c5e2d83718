"""Sampling the hierarchy study in stacks of chains, against a loop of single chains: ratios within one run.

    python benchmarks/hierarchy_speed.py

A loop of single chains is (a) this package with one chain per block, tuned and evaluated as the stack is, and (b) what
one would write by hand: a module, autograd, SGLD and the losses of every draw. All take the same number of steps and
draws at a few checkpoints of the aligned run; times are per chain, and those of single chains are measured on some.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from stagewise.checkpoints.trajectory import Checkpoint
from stagewise.sampling.chains import Chains, sample_block, tune
from stagewise.sampling.posterior import LocalDensity
from stagewise.studies.hierarchy.lab import Lab, Size
from stagewise.task import Task

CHECKPOINTS, SINGLE_CHAINS = 4, 4
console = Console(width=110)


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Least time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = Size()
        lab = Lab(Path(folder), size)
        run, posterior = lab.single, lab.window_posterior
        plan = Chains(chains=size.chains, draws=size.draws, batching="stacked")
        single = replace(plan, chains=1, batching="loop")
        totals = {"stack": 0.0, "single": 0.0, "by hand": 0.0}
        chosen = lab.steps[:: len(lab.steps) // CHECKPOINTS][:CHECKPOINTS]
        for step in chosen:
            checkpoint = run.trajectory.load(step)
            density = posterior.at(run.task, checkpoint)
            tuning = tune(density, plan)
            steps = tuning.burn_in + plan.draws * tuning.thinning

            def block(chains: Chains, number: int = 0, checkpoint: Checkpoint = checkpoint) -> object:
                return sample_block(run.task, checkpoint, posterior, chains, number)

            def hand(checkpoint: Checkpoint = checkpoint, density: LocalDensity = density) -> None:
                by_hand(run.task, checkpoint, density, steps, tuning.thinning)

            totals["stack"] += seconds(lambda block=block: block(plan)) / plan.chains
            loop = seconds(lambda block=block: [block(single, number) for number in range(SINGLE_CHAINS)], 1)
            totals["single"] += loop / SINGLE_CHAINS
            totals["by hand"] += seconds(hand, 1)
        table = Table(
            "per chain", "milliseconds", "times the stack",
            title=f"{len(chosen)} checkpoints, {plan.chains} chains x {plan.draws} draws, {torch.get_num_threads()} threads",
        )  # fmt: skip
        names = {
            "stack": f"{plan.chains} chains stacked",
            "single": "single chains, one after the other",
            "by hand": "by hand",
        }
        for name, text in names.items():
            spent = totals[name] / len(chosen)
            table.add_row(text, f"{1e3 * spent:.1f}", f"{totals[name] / totals['stack']:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
