"""The training runs and measurements that several experiments of the study share, each made once and when needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from stagewise.influence.bif import bif
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import measured_influence
from stagewise.retraining.two_times import influence_in_time
from stagewise.run.engine import sample
from stagewise.run.progress import Progress, silent
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.hierarchy.network import Run, Start, optimizer, record, task
from stagewise.studies.hierarchy.settings import FULL, LAST, RATE, WINDOW, Settings
from stagewise.studies.hierarchy.theory.modes import Modes, mixed_strengths
from stagewise.studies.hierarchy.theory.tree import KINGDOMS, Floats, Items
from stagewise.traces.store import TraceStore

N_BETA_PER_SAMPLE = 1000.0
"""Of the posteriors that are set by a window. Ten is the default; the even share of its draws, which needs no ground
truth, is far above what the diagnostics allow here, and they ask for more."""

INSTANT_GAMMA = 1e3
"""Of a posterior so tight that its influence is -1/gamma times the product of gradients."""

LOOSE_GAMMA = 20.0
"""Of a posterior that reaches far beyond first order."""


class Lab:
    """Runs of the eight-leaf tree from an aligned and from a random start, and what is measured on them.

    Args:
        folder: where sampled traces are kept; a killed study continues from there.
        settings: how much is computed.
        progress: called with (what, done, in all).
    """

    def __init__(self, folder: Path, settings: Settings = FULL, progress: Progress = silent) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.items = Items.of(KINGDOMS)
        self.level = self.items.tree.split_level()
        self.off_diagonal = self.level > 0
        self.steps = settings.steps
        self.times = RATE * np.array(self.steps)

    @cached_property
    def aligned(self) -> Run:
        """From an aligned start, float64."""
        return self.run("aligned")

    @cached_property
    def random(self) -> Run:
        """From a random start, float64."""
        return self.run("random")

    def run(self, start: Start, dtype: torch.dtype = torch.float64) -> Run:
        """Gradient descent with checkpoints at the lab's steps; a window may begin at the last of them."""
        network = task(self.items, start=start, dtype=dtype)
        return record(network, optimizer(self.items, "sgd", RATE), LAST + WINDOW, self.steps)

    def predicted_strengths(self, run: Run, times: Floats) -> tuple[Modes, Floats]:
        """Modes of the data, and their strengths ``(time, mode, mode)`` by the theory."""
        modes = Modes.of(self.items.white_targets())
        first, second = run.layers([0])
        return modes, mixed_strengths(modes.s, modes.initial(first[0], second[0]), times)

    @cached_property
    def removed_windows(self) -> xr.Dataset:
        """What leaving each item out during a window from every checkpoint of the aligned run does."""
        run = self.aligned
        return window_ablation(run.task, run.trajectory, window=WINDOW, weight=0.0, order=run.order)

    @cached_property
    def measured_windows(self) -> xr.Dataset:
        """Influence as measured by that."""
        return measured_influence(self.removed_windows)

    @cached_property
    def in_two_times(self) -> xr.Dataset:
        """The exact derivative of the aligned run, by when items are shown and when it is asked for."""
        run, steps = self.aligned, list(self.settings.two_times_steps)
        return influence_in_time(run.task, run.start, run.order, steps[1:], bins=steps)

    @cached_property
    def sampled_windows(self) -> xr.Dataset:
        """The Bayesian influence function of that window, sampled at every checkpoint of the aligned run."""
        return bif(self.window_traces)

    @cached_property
    def window_traces(self) -> TraceStore:
        """The loss traces behind it."""
        return self.sample(self.aligned_float32, self.window_posterior, "window")

    @cached_property
    def instant_traces(self) -> TraceStore:
        """Loss traces of a tight posterior, whose influence is that of an instant, times 1/gamma."""
        return self.sample(self.aligned_float32, self.posterior(INSTANT_GAMMA), f"gamma {INSTANT_GAMMA:g}")

    @cached_property
    def loose_traces(self) -> TraceStore:
        """Loss traces of a posterior far beyond first order."""
        return self.sample(self.aligned_float32, self.posterior(LOOSE_GAMMA), f"gamma {LOOSE_GAMMA:g}")

    @cached_property
    def aligned_float32(self) -> Run:
        """The aligned run in float32, for sampling: twice as fast, and as exact as draws can tell."""
        return self.run("aligned", dtype=torch.float32)

    def posterior(self, gamma: float) -> LocalPosterior:
        """A posterior set by hand, with the weight of every sample kappa = n_beta / n at 1."""
        return LocalPosterior(gamma=gamma, n_beta=float(len(self.items.targets)))

    @property
    def window_posterior(self) -> LocalPosterior:
        """The local posterior of a window."""
        return LocalPosterior(window=WINDOW, n_beta=N_BETA_PER_SAMPLE * len(self.items.targets))

    def sample(self, run: Run, posterior: LocalPosterior, name: str, **changes: Any) -> TraceStore:
        """Sample a posterior at every checkpoint of a run, all chains of a checkpoint stacked."""
        sizes = {"chains": self.settings.chains, "draws": self.settings.draws}
        sampling: dict[str, Any] = sizes | {"batching": "stacked"} | changes
        folder = self.folder / name.replace(" ", "-")
        _check_steps(folder, run.trajectory.steps)

        def progress(_: str, done: int, total: int) -> None:
            self.progress(f"sampling: {name}", done, total)

        return sample(
            run.task,
            run.trajectory,
            posterior=posterior,
            out=folder,
            workers=self.settings.workers,
            progress=progress,
            **sampling,
        )

    def matrix(self, dataset: xr.Dataset, variable: str = "value") -> Floats:
        """A labelled influence as ``(step, train, query)`` in the order of the items."""
        return matrix(self.items, dataset, variable)

    def of_kind(self, level: int) -> Floats:
        """Which pairs part on a level: ``(train, query)`` of 0 and 1, normalised to take their mean."""
        there = (self.level == level).astype(float)
        mean: Floats = there / there.sum()
        return mean


def _check_steps(folder: Path, steps: Sequence[int]) -> None:
    """Refuse a folder of a study of other settings before anything is added to it."""
    if not (folder / "identity.json").exists():  # nothing yet, or killed before there was anything
        return
    there = TraceStore.read_only(folder).steps
    if not set(there) <= set(steps):
        raise ValueError(
            f"{folder} holds traces of other checkpoints ({len(there)} from {there[0]} to {there[-1]}): it is of a "
            "study of other settings; choose another folder"
        )


def matrix(items: Items, dataset: xr.Dataset, variable: str = "value") -> Floats:
    """A labelled influence as ``(step, train, query)`` in the order of the items."""
    chosen = dataset[variable].sel(train=items.names, query=items.names)
    return np.asarray(chosen.transpose("step", "train", "query").values)


def correlation(a: Floats, b: Floats) -> float:
    """Pearson's, over all entries."""
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def slope(predicted: Floats, measured: Floats) -> float:
    """Of measured on predicted through the origin: 1 where the predicted size is right."""
    return float((predicted * measured).sum() / (predicted**2).sum())
