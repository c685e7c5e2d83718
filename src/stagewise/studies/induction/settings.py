"""How much is computed: the sequences, the network, its training, and where its windows begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stagewise.checkpoints.when import log_spaced
from stagewise.sampling.chains import Chains
from stagewise.sampling.posterior import LocalPosterior


@dataclass(frozen=True)
class Settings:
    """Sizes and rates. The default is the study; tests take less.

    Attributes:
        seeds: number of runs, which differ in their seed.
        vocabulary: number of tokens.
        length: tokens of a sequence.
        sequences: of the training set, the same for all seeds.
        probes: sequences that the network is measured on, and as many that are a random piece repeated.
        data_seed: of all sequences.
        width: of the residual stream.
        heads: of each layer.
        batch_size: sequences per update.
        rate: learning rate of Adam.
        last: number of updates.
        every: updates between checkpoints; the first come closer together.
        window: updates during which the weight of a class is changed.
        window_starts: checkpoints where windows are trained again: early on, on the plateau, at the transition's
            start, in it and after it.
        weights: of a class during a window; none of them 1.
        asked: steps at which the network is asked what it owes to earlier training.
        bins: edges of the bins in which that training is told apart.
        plateau: two of them, between which induction tokens have the weight ``changed`` once.
        changed: that weight.
        queries: of the probes, those whose losses are influenced.
        part: training sequences that stand for all where an estimator looks at the checkpoint alone.
        solved: of the window starts, those that damped influence is asked about.
        sampled: of the window starts, those that chains are asked about.
        sampled_window: updates of a window that chains are asked about: one of ``window`` is localised at none of them.
        budget: share of all weight that is moved onto some tokens while induction forms, see :func:`curriculum`.
        most: largest weight of a token then.
        until: last update of runs with other weights.
        choose_every: updates after which weights that are not set beforehand are chosen again.
        look_every: updates between looks at runs with other weights.
    """

    seeds: int = 8
    vocabulary: int = 3
    length: int = 100
    sequences: int = 8192
    probes: int = 256
    data_seed: int = 0
    width: int = 32
    heads: int = 1
    batch_size: int = 32
    rate: float = 5e-4
    last: int = 800
    every: int = 25
    window: int = 30
    window_starts: tuple[int, ...] = (50, 150, 300, 375, 450, 600)
    weights: tuple[float, ...] = (0.8, 0.95)
    asked: tuple[int, ...] = (400, 500, 600)
    bins: tuple[int, ...] = tuple(range(0, 601, 50))
    plateau: tuple[int, int] = (100, 250)
    changed: float = 0.95
    queries: int = 128
    part: int = 512
    solved: tuple[int, ...] = (150, 375)
    sampled: tuple[int, ...] = (150, 375)
    sampled_window: int = 3
    budget: float = 0.5
    most: float = 2.0
    until: int = 600
    choose_every: int = 50
    look_every: int = 10

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints: log-spaced up to the first of the evenly spaced ones, and the start."""
        even = range(self.every, self.last + 1, self.every)
        return tuple(sorted({0, *log_spaced(self.every, 4), *even, self.last}))

    @property
    def exact_starts(self) -> tuple[int, ...]:
        """The checkpoints from which there are batches to a window's end."""
        return tuple(step for step in self.steps if step + self.window <= self.last)

    @property
    def observed(self) -> tuple[int, ...]:
        """The checkpoints that the local posterior is asked at: the evenly spaced ones, while something is learnt."""
        return tuple(range(self.every, self.until + 1, self.every))

    def as_plain(self) -> dict[str, Any]:
        """By name, as a report and JSON show them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def of_a_run(self) -> dict[str, int | float]:
        """Those that a training run and its checkpoints depend on, and not only what is asked of them."""
        asked = {"seeds", "window", "window_starts", "weights", "asked", "bins", "plateau", "changed", "queries"}
        asked |= {"part", "solved", "sampled", "sampled_window"}
        asked |= {"budget", "most", "until", "choose_every", "look_every"}
        return {name: value for name, value in vars(self).items() if name not in asked}


FULL = Settings()
"""The study."""

OBSERVED_RUNS = 5
"""Of the runs, the first that the local posterior of every checkpoint is asked about."""

OBSERVED_SEQUENCES = 16
"""Training sequences that its loss is the mean of, and as many queries: an update of a chain costs all gradients."""

POSTERIOR = LocalPosterior(gamma=2e4, n_beta=1e4, metric="euclidean")
"""The same at all checkpoints, so that what it tells of them can be compared.

Windows of training are not localised on this network. gamma / n_beta is 2 because the loss curves downwards by up to
1.2 in the first updates of the first run; less would do later, with longer chains. n_beta was tried at 10,000 alone:
one to three per cent of the spread of losses are of second order, and in a pilot R-hat was below 1.1. Neither was
chosen by any influence. Checkpoints whose chains have not converged are left out.
"""

OBSERVING = Chains(chains=4, draws=16)
"""Step, burn-in and thinning follow from the curvature at the checkpoint."""

EIGHT = Settings(
    vocabulary=8,
    sequences=16384,
    rate=1e-3,
    last=1000,
    window_starts=(50, 300, 600, 700, 800, 900),
    asked=(700, 800, 900),
    bins=tuple(range(0, 901, 100)),
    plateau=(200, 600),
    solved=(300, 700),
    sampled=(300, 700),
    until=1000,
)
"""The same with eight tokens: a longer plateau and a sharper transition."""

REDUCED = Settings(
    seeds=2,
    length=24,
    sequences=512,
    probes=48,
    width=16,
    rate=1e-2,
    last=100,
    every=20,
    window=2,
    window_starts=(20, 60),
    weights=(0.95,),
    asked=(60, 80),
    bins=tuple(range(0, 81, 20)),
    plateau=(20, 40),
    queries=16,
    part=64,
    solved=(60,),
    sampled=(60,),
    sampled_window=1,
    until=100,
    choose_every=20,
    look_every=5,
)
"""As little as shows the stages: seconds."""
