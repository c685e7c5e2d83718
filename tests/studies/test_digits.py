"""The proof, reduced: sampled influence on the digits study predicts what retraining measures."""

import pytest

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.run.engine import sample
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.digits.training import batch_order, record, task

EARLY, LATER = 31, (120,)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    record(folder, 64, (EARLY, *LATER))
    digits, trajectory = task(), Trajectory.from_directory(folder)
    traces = sample(
        digits,
        trajectory,
        posterior=LocalPosterior(window=30),
        out=folder / "run",
        chains=16,
        draws=60,
        batching="stacked",
    )
    influence = bif(traces, train_groups=digits.train_groups, query_groups=digits.query_groups)
    measured = window_ablation(digits, trajectory, window=30, steps=LATER, repeats=2, order=batch_order(64))
    return digits, trajectory, influence, measured


def test_predicted_effects_agree_with_retraining_in_order_and_in_size(study):
    _, _, influence, measured = study
    scores = agreement(predicted_effect(influence, 0.8)["effect"], measured["effect"])
    assert (scores["correlation_off_diagonal"] > 0.7).all(), scores
    assert (scores["correlation"] > 0.95).all(), scores
    assert ((scores["slope"] > 0.7) & (scores["slope"] < 1.6)).all(), scores


def test_sampled_and_solved_influence_agree_within_the_sampled_error(study):
    digits, trajectory, influence, _ = study
    solved = damped_influence(digits, trajectory, LocalPosterior(window=30), curvature="hessian", steps=LATER)
    z = (influence["value"] - solved["value"]) / influence["stderr"]
    # Sampling also sees what is beyond first order, so the two need not agree exactly.
    assert (abs(z) < 3).mean() > 0.9
    assert abs(z.mean()) < 0.5


def test_checkpoint_inside_the_fast_drop_is_flagged_without_the_measurement(study):
    _, _, influence, _ = study
    assert influence["step"].values.tolist() == list(LATER)
    assert f'"{EARLY}"' in influence.attrs["omitted"]
    assert "not localised" in influence.attrs["omitted"]
