"""How much the study computes, and the training runs that it is about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stagewise.studies.hierarchy.theory.tree import Floats

RATE = 0.004
"""Learning rate per sample: training time t = step x RATE."""
LAST = 2000
"""Steps of a run: t = 8."""
EVERY_TIME: Floats = np.linspace(0, RATE * LAST, LAST + 1)
"""The time at every step."""
WINDOW = 25
"""Steps of a time window: 0.1 of t, short beside the stages."""


@dataclass(frozen=True)
class Settings:
    """How much is computed: sizes and grids. The default is the study; tests take less.

    Attributes:
        checkpoints: about how many checkpoints are sampled.
        chains: chains at each.
        draws: draws of each chain.
        workers: processes that sample.
        whole_run_steps: when the effect of leaving an item out of the whole run is looked at.
        window_starts: first steps of the windows of the sweep of windows.
        two_times_steps: edges of the bins of influence in two times, and when it is asked for.
        symmetry_steps: checkpoints on the balanced and the lopsided tree; by the last of the default, what
            distinguishes plants from animals is learnt.
        attribution_times: when attribution is asked for, the last being the end of training: the items are learnt.
        resamples: of the bootstrap over items.
        starts: random starts over which influence is compared with that at the end.
        sweep_gammas: localisations of the sweep of settings.
        sweep_step_sizes: in units of 1/gamma: SGLD contracts by a factor 1 - step_size gamma / 2.
        sweep_kappas: n_beta per sample.
        sweep_checkpoints: how many checkpoints the sweep pools.
        adam_checkpoints: of every Adam run, evenly spread.
        adam_starts: Adam runs, which differ in their initial weights.
        adam_sampled_every: of the first Adam run's checkpoints, every how many-th is sampled.
        adam_draws: draws of a chain there.
        phase_checkpoints: log-odds at which the two-phase posterior is looked at.
        phase_draws: draws of a chain there: they cost little, and standard errors need hundreds in the rarer phase.
    """

    checkpoints: int = 60
    chains: int = 64
    draws: int = 192
    workers: int = 2
    whole_run_steps: range = range(0, LAST + 1, 10)
    window_starts: range = range(50, 1300, 25)
    two_times_steps: range = range(0, 1501, 60)
    symmetry_steps: range = range(0, 1200, 15)
    attribution_times: tuple[float, ...] = (1.0, 1.3, 1.7, 2.3, 3.4, 4.5, 6.0)
    resamples: int = 400
    starts: int = 20
    sweep_gammas: tuple[float, ...] = (20.0, 100.0, 1e3, 1e4)
    sweep_step_sizes: tuple[float, ...] = (0.02, 0.2, 2.0)
    sweep_kappas: tuple[float, ...] = (0.1, 1.0, 10.0)
    sweep_checkpoints: int = 4
    adam_checkpoints: int = 74
    adam_starts: int = 5
    adam_sampled_every: int = 3
    adam_draws: int = 64
    phase_checkpoints: int = 21
    phase_draws: int = 512

    @property
    def steps(self) -> list[int]:
        """The checkpoints: three in four of them before t = 4, where the transitions are."""
        early = np.linspace(0.06 * LAST, LAST / 2, 3 * self.checkpoints // 4, endpoint=False)
        late = np.linspace(LAST / 2, LAST, self.checkpoints - len(early))
        return [int(step) for step in np.unique(np.concatenate([early, late]).round())]

    def as_plain(self) -> dict[str, int | str | list[float]]:
        """By name, as a report shows them: grids of steps as ``0 to 2000 by 10``."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: int | range | tuple[float, ...]) -> int | str | list[float]:
    if isinstance(value, range):
        return f"{value[0]} to {value[-1]} by {value.step}"
    return list(value) if isinstance(value, tuple) else value


FULL = Settings()
"""The study."""

# Fewer checkpoints cannot resolve the flips.
REDUCED = Settings(
    checkpoints=20,
    draws=96,
    workers=1,
    whole_run_steps=range(0, 801, 20),
    window_starts=range(50, 1300, 250),
    two_times_steps=range(0, 401, 80),
    symmetry_steps=range(0, 1200, 30),
    attribution_times=(0.8, 1.3, 2.3),
    sweep_gammas=(20.0, 1e3),
    sweep_step_sizes=(0.2, 8.0),
    sweep_kappas=(1.0, 10.0),
    sweep_checkpoints=1,
    adam_checkpoints=16,
    adam_starts=2,
    adam_sampled_every=4,
    phase_checkpoints=11,
)
"""As little as shows what the study shows: a minute."""
