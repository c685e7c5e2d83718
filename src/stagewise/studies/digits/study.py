"""The digits study's settings: the complete experiment, and the demo that is a short version of it."""

from __future__ import annotations

from pathlib import Path

from stagewise.checkpoints.when import log_spaced
from stagewise.run.config import Retraining, RunConfig
from stagewise.sampling.chains import Chains
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.digits.training import ORDER_SEED, record

WINDOW = 30
_TASK = "stagewise.studies.digits.training:task"


def study(folder: Path) -> list[RunConfig]:
    """Both runs of the complete study: Adam with the full batch, and with minibatches of 64."""
    return [
        _settings(folder / "full_batch", "Digits, full batch", 0, 1500, 32, Chains(chains=32, draws=80)),
        _settings(folder / "minibatch", "Digits, minibatches of 64", 64, 1500, 32, Chains(chains=32, draws=80)),
    ]


def demo(folder: Path) -> RunConfig:
    """A short version of the minibatch run: fewer checkpoints and draws."""
    return _settings(folder, "Handwritten digits", 64, 1000, 18, Chains(chains=32, draws=64), two_times=5)


def _settings(
    folder: Path, title: str, batch_size: int, last: int, checkpoints: int, sampling: Chains, two_times: int = 0
) -> RunConfig:
    """Record the training run if it is not there yet, and say how to study it."""
    recorded = folder / "checkpoints"
    if not recorded.exists():
        record(recorded, batch_size, log_spaced(last, checkpoints, first=8))
    return RunConfig(
        title=title,
        task=_TASK,
        checkpoints=recorded,
        out=folder,
        posterior=LocalPosterior(window=WINDOW),
        sampling=sampling,
        per="sample",
        two_times=two_times,
        retraining=Retraining(recorded_order_seed=ORDER_SEED),
    )
