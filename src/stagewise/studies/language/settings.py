"""How much is computed: the text, the network, its training, and where its windows begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stagewise.checkpoints.when import log_spaced

_ASKED = {"seeds", "window", "window_starts", "weights", "queries", "part", "solved", "sampled", "sampled_window"}


@dataclass(frozen=True)
class Settings:
    """Sizes and rates. The default is the study; tests take less.

    Attributes:
        seeds: number of runs, which differ in their seed.
        characters: of the text.
        vocabulary: number of tokens.
        length: tokens of a sequence.
        probes: sequences that the network is measured on, and that no run is trained on.
        data_seed: of the text's order, and of which sequences are probes.
        width: of the residual stream.
        layers: of the network.
        heads: of each layer.
        batch_size: sequences per update.
        rate: largest learning rate of AdamW.
        warm_up: updates until it is reached, from 0; then it follows a cosine down to 0.
        last: number of updates.
        checkpoints: log-spaced ones from step 4 on, beside the start and those where windows begin.
        window: updates during which the weight of a class is changed.
        window_starts: checkpoints where windows are trained again.
        weights: of a class during a window; none of them 1.
        queries: of the probes, those whose losses are influenced.
        part: training sequences that stand for all where an estimator looks at the checkpoint alone.
        solved: of the window starts, those that damped influence is asked about.
        sampled: of the window starts, those that chains are asked about.
        sampled_window: updates of a window that chains are asked about: longer ones are localised nowhere.
    """

    seeds: int = 3
    characters: int = 600_000
    vocabulary: int = 1024
    length: int = 128
    probes: int = 64
    data_seed: int = 0
    width: int = 64
    layers: int = 2
    heads: int = 4
    batch_size: int = 8
    rate: float = 2e-3
    warm_up: int = 50
    last: int = 1500
    checkpoints: int = 20
    window: int = 10
    window_starts: tuple[int, ...] = (10, 36, 91, 231, 588, 1098)
    weights: tuple[float, ...] = (0.8, 0.95)
    queries: int = 32
    part: int = 48
    solved: tuple[int, ...] = (91, 588)
    sampled: tuple[int, ...] = (91, 588)
    sampled_window: int = 3

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints."""
        return tuple(sorted({0, *log_spaced(self.last, self.checkpoints, first=4), *self.window_starts}))

    @property
    def exact_starts(self) -> tuple[int, ...]:
        """The checkpoints from which there are batches to a window's end."""
        return tuple(step for step in self.steps if step + self.window <= self.last)

    def as_plain(self) -> dict[str, Any]:
        """By name, as a report and JSON show them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def of_a_run(self) -> dict[str, Any]:
        """Those that a training run and its checkpoints depend on, and not only what is asked of them."""
        return {name: value for name, value in self.as_plain().items() if name not in _ASKED} | {"steps": [*self.steps]}


FULL = Settings()
"""The study."""

MINIATURE = Settings(
    seeds=2,
    characters=40_000,
    vocabulary=300,
    length=24,
    probes=16,
    width=16,
    heads=2,
    rate=1e-2,
    warm_up=4,
    last=40,
    checkpoints=5,
    window=2,
    window_starts=(4, 22),
    weights=(0.95,),
    queries=8,
    part=16,
    solved=(22,),
    sampled=(22,),
    sampled_window=1,
)
"""As little as goes through all of it: seconds."""
