"""What the study will cost, from short timings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from stagewise.reporting import words
from stagewise.retraining.window_influence import window_influence
from stagewise.sampling.chains import sample_block
from stagewise.studies import pricing
from stagewise.studies.induction.arms import ARMS, decisions
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.observed import observed_task
from stagewise.studies.induction.settings import FULL, OBSERVED_RUNS, OBSERVING, POSTERIOR, Settings
from stagewise.studies.induction.training import EXCESS
from stagewise.studies.timing import of_window, timed

_SHORT, _START = 12, 1


def cost(settings: Settings = FULL) -> str:
    """Predicted cost as text; a few updates of each kind are made, in a temporary folder."""
    with TemporaryDirectory() as folder:
        lab = Lab(Path(folder), replace(settings, last=_SHORT, every=_SHORT, window_starts=(_START,)))
        update = timed(lambda: lab.run(0)) / _SHORT
        exact, others = pricing.exact(lab, _START, settings.window), pricing.others(lab, settings)
        chains = timed(lambda: sample_block(observed_task(lab, 0), lab.run(0).load(_SHORT), POSTERIOR, OBSERVING))
        choice = of_window(lambda length: _choose(lab, length), settings.window)
    windows, count = len(settings.exact_starts), settings.seeds
    looks, observed = len(settings.observed), min(OBSERVED_RUNS, count)
    chains *= looks * observed / count
    parts = {
        f"training {words.count(count, 'run')}": settings.last * update,
        f"exact influence of {words.count(windows, 'window')} in each, and its control": windows * exact,
        f"the local posterior of {words.count(observed, 'run')} at {words.count(looks, 'checkpoint')}": chains,
        **others,
        # Every query group has a derivative for each step that is asked for, and one run is made again, twice.
        "influence in two times": settings.asked[-1] * (len(settings.asked) * exact / settings.window + 2 * update),
        # At most: most of these runs begin where induction forms.
        f"training with other weights, in {words.count(len(ARMS), 'way')}": len(ARMS) * settings.until * update,
        "choosing those weights": (2 + len(decisions(settings))) * choice,
    }
    return pricing.told(parts, count)


def _choose(lab: Lab, length: int) -> None:
    """Ask what a choice of weights asks."""
    window_influence(lab.task(0), lab.run(0), window=length, steps=[_START], queries=[EXCESS])
