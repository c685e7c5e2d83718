"""Samples that an estimate picks against others that it does not, by retraining."""

import numpy as np
import pytest
import xarray as xr
from problems import classifier

from stagewise.checkpoint import Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.extremes import extremes_ablation
from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.training import train_and_record
from stagewise.retraining.window_influence import window_influence

WINDOW, STEP = 6, 8
OPTIONS = {"window": WINDOW, "order": BatchOrder(60)}


@pytest.fixture(scope="module")
def case():
    task = classifier()
    run = Trajectory.from_checkpoints(train_and_record(task, Optimizer("adam", 0.02), BatchOrder(60), [STEP]))
    return task, run, window_influence(task, run, per="sample", **OPTIONS)


def test_effects_are_those_of_retraining_without_the_extreme_samples_and_near_what_was_predicted(case):
    task, run, exact = case
    proof = extremes_ablation(task, run, exact, count=3, weight=0.9, draws=2, **OPTIONS)
    for k, query in enumerate(("0", "1", "2")):
        ranked = np.argsort(exact.value.sel(step=STEP, query=query).values)
        for side, picked in (("helpful", ranked[:3]), ("harmful", ranked[-3:])):
            schedules = [Schedule(), Schedule.window(picked, STEP, WINDOW, 0.9)]
            losses = retrain(task, run.load(STEP), schedules, BatchOrder(60), [STEP + WINDOW])
            expected = losses.values[0, 1, k] - losses.values[0, 0, k]
            got = proof.sel(step=STEP, side=side, query=query)
            np.testing.assert_allclose(got.effect, expected, rtol=1e-9)
            np.testing.assert_allclose(got.predicted, expected, rtol=0.05)
    assert (proof.effect.sel(side="helpful") > 0).all()
    assert (proof.effect.sel(side="harmful") < 0).all()


def test_what_was_picked_stands_out_of_random_samples_and_noise_does_not(case):
    task, run, exact = case
    proof = extremes_ablation(task, run, exact, count=4, draws=8, **OPTIONS)
    towards = xr.DataArray([1, -1], dims="side")
    assert (towards * proof.difference > 2 * proof.difference_stderr).mean() > 0.8
    mixed = exact.copy(deep=True)
    order = np.random.default_rng(0).permutation(60)
    mixed["value"] = exact["value"].copy(data=exact["value"].values[:, order])
    chance = extremes_ablation(task, run, mixed, count=4, draws=8, **OPTIONS)
    assert (towards * chance.difference > 2 * chance.difference_stderr).mean() < 0.4


def test_random_samples_are_of_the_same_groups_and_of_like_loss_and_never_those_that_were_picked(case, monkeypatch):
    task, run, exact = case
    made = []
    window = Schedule.window
    monkeypatch.setattr(Schedule, "window", lambda samples, *rest: made.append(samples) or window(samples, *rest))
    extremes_ablation(task, run, exact, count=5, draws=3, **OPTIONS)
    picked, *random = map(np.array, made[:4])
    params = run.load(STEP).params
    losses = task.losses(params, task.train.batch(slice(None))).detach().numpy()
    for draw in random:
        assert not set(draw) & set(picked)
        assert sorted(draw % 3) == sorted(picked % 3)
        gap = abs(np.sort(losses[draw]) - np.sort(losses[picked])).mean()
        assert gap < abs(losses[:, None] - losses[picked]).mean()
    assert len({tuple(sorted(draw)) for draw in random}) == 3


def test_labels_of_groups_and_impossible_numbers_are_refused(case):
    task, run, exact = case
    with pytest.raises(ValueError, match="train label 'big'"):
        extremes_ablation(task, run, exact.isel(train=[0]).assign_coords(train=["big"]), count=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"lacks the queries \['0'\]"):
        extremes_ablation(task, run, exact.isel(query=[1, 2]), count=1, **OPTIONS)
    with pytest.raises(ValueError, match="more than half"):
        extremes_ablation(task, run, exact, count=31, **OPTIONS)
    with pytest.raises(ValueError, match="pick fewer"):
        extremes_ablation(task, run, exact, count=25, **OPTIONS)
    with pytest.raises(ValueError, match="draws >= 2"):
        extremes_ablation(task, run, exact, count=1, draws=1, **OPTIONS)
