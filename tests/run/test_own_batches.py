"""A run that knows its own batches, in what `stagewise run` tries, measures and keeps."""

from dataclasses import replace

import springs
import torch

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.run import analysis
from stagewise.run.analysis import Analysis
from stagewise.run.config import make_config
from stagewise.run.preflight import preflight
from stagewise.run.progress import silent

CONFIG = make_config(
    {
        "task": "t.py:task",
        "checkpoints": "c",
        "out": "o",
        "posterior": {"window": 3},
        "retraining": {"repeats": 1},
        "estimators": ["bif"],
    }
)


class Causes:
    """Keeps nothing but what each result depended on."""

    def __init__(self):
        self.seen = {}

    def get(self, name, cause, compute):
        self.seen.setdefault(name, []).append(cause)
        return compute()


def run(last=5):
    """Batches of the updates to step 10 are recorded, those to step 20 are not."""
    batches = tuple(torch.tensor([k % 6, last if k == 2 else (k + 1) % 6]) for k in range(10))
    checkpoints = map(springs.trajectory().load, (0, 10, 20))
    return Trajectory.from_checkpoints(replace(c, batches=batches if c.step == 10 else ()) for c in checkpoints)


def measured(trajectory):
    kept = Causes()
    found = analysis.measure(
        Analysis(springs.task(), trajectory, CONFIG, dict.fromkeys([0, 10], "digest"), kept, silent)
    )
    return found, kept.seen


def test_attributes_and_replay_say_which_windows_had_the_runs_own_batches():
    found, _ = measured(run())
    assert found["measured"].attrs["batches"] == "recorded and fresh"
    assert found["replay"]["miss"].notnull().values.tolist() == [True, False]
    unknown, _ = measured(springs.trajectory())
    assert unknown["measured"].attrs["batches"] == "fresh"


def test_what_was_kept_is_computed_again_where_other_batches_were_recorded_within_the_window():
    causes = [measured(trajectory)[1] for trajectory in (springs.trajectory(), run(), run(last=0))]
    windows = [cause["retraining windows"] for cause in causes]
    assert len({window[0] for window in windows}) == 3
    assert len({window[1] for window in windows}) == 1  # from step 10 on nothing is known
    assert len({cause["repeating the run"][0] for cause in causes}) == 3


def test_trying_retraining_on_a_few_samples_does_not_ask_them_for_the_batches_of_all(monkeypatch):
    monkeypatch.setattr("stagewise.run.preflight._FEW", 2)
    assert preflight(springs.task(), run(), CONFIG, [0]) == {}


def test_effects_of_own_batches_beside_fresh_ones_have_an_error_of_zero_and_not_none():
    """Averaged over nothing beside averaged over four orders: a missing error would spoil every comparison."""
    kept, settings = (
        Causes(),
        CONFIG.model_copy(update={"retraining": CONFIG.retraining.model_copy(update={"repeats": None})}),
    )
    found = analysis.measure(Analysis(springs.task(), run(), settings, dict.fromkeys([0, 10], "digest"), kept, silent))
    error = found["measured"]["effect_stderr"]
    assert not error.sel(step=0).any()
    assert (error.sel(step=10) > 0).any()
    assert error.notnull().all()
