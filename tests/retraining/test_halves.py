"""Windows retrained with random halves of the samples at other weights, and the score of what orders them."""

import dataclasses

import numpy as np
import pytest
import xarray as xr
from problems import N, Regression, classifier
from scipy.stats import spearmanr

from stagewise.checkpoint import Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.halves import window_halves
from stagewise.retraining.lds import window_lds
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.training import train_and_record
from stagewise.retraining.window_influence import window_influence
from stagewise.task import Task

WINDOW = 6
PLACE = np.array([1.0, -0.5, 2.0, 0.3])


@pytest.fixture(scope="module")
def case():
    """Two checkpoints of a classifier, full batch."""
    task, order = classifier(), BatchOrder(60)
    run = Trajectory.from_checkpoints(train_and_record(task, Optimizer("adam", 0.02, batch_size=0), order, [8, 30]))
    exact = window_influence(task, run, window=WINDOW, per="sample")
    return task, run, exact, window_halves(task, run, window=WINDOW, halves=12)


def test_an_effect_is_that_of_gradient_descent_with_these_weights():
    problem = Regression()
    measured = window_halves(problem.task, problem.trajectory(PLACE), window=WINDOW, halves=3)
    before = problem.query_means(problem.after(PLACE, WINDOW, np.ones(N)))
    for half in range(3):
        after = problem.query_means(problem.after(PLACE, WINDOW, measured.weight[half].values))
        np.testing.assert_allclose(measured.effect[0, half], after - before, rtol=1e-8)
    assert measured.effect.dims == ("step", "half", "query")
    assert measured.attrs["batches"] == "whole training set"


def test_every_half_is_half_of_the_candidates_and_no_two_are_alike(case):
    measured = case[3]
    assert ((measured.weight == 0.5).sum("train") == 30).all()
    assert ((measured.weight == 1.5).sum("train") == 30).all()
    assert len({tuple(row) for row in measured.weight.values}) == 12
    assert measured["train"].values.tolist() == [str(k) for k in range(60)]


def test_samples_that_are_no_candidates_keep_their_weight():
    problem = Regression()
    task, chosen = problem.task, [1, 4, 7, 11, 20]
    fewer = Task(
        task.model,
        task.loss,
        train=(problem.x, problem.y),
        queries={"val": (problem.xq, problem.yq)},
        candidates=chosen,
    )
    measured = window_halves(fewer, problem.trajectory(PLACE), window=WINDOW, halves=2)
    assert measured["train"].values.tolist() == [str(k) for k in chosen]
    assert (measured.weight == 0.5).sum("train").values.tolist() == [2, 2]
    beta = np.ones(N)
    before = problem.query_means(problem.after(PLACE, WINDOW, beta)).mean()
    beta[chosen] = measured.weight[1]
    after = problem.query_means(problem.after(PLACE, WINDOW, beta)).mean()
    np.testing.assert_allclose(measured.effect[0, 1, 0], after - before, rtol=1e-8)


def test_halves_are_the_same_at_every_checkpoint_and_others_with_another_seed(case):
    task, run, _, measured = case
    alone = window_halves(task, run, window=WINDOW, halves=12, steps=[30])
    np.testing.assert_allclose(alone.effect[0], measured.effect.sel(step=30), rtol=1e-6)
    other = window_halves(task, run, window=WINDOW, halves=12, steps=[30], seed=1)
    assert (other.weight != measured.weight).any()


def test_exact_influence_orders_small_changes_perfectly_and_with_the_wrong_sign_perfectly_wrong(case):
    task, run, exact, _ = case
    small = window_halves(task, run, window=WINDOW, halves=12, weights=(0.999, 1.001))
    for sign in (1, -1):
        got = window_lds(exact.assign(value=sign * exact.value), small)
        for name in ("lds", "lds_lower", "lds_upper"):
            np.testing.assert_allclose(got[name], sign, atol=1e-9)


def test_it_is_scipys_spearman_of_the_sums_over_samples_averaged_over_queries(case):
    _, _, exact, measured = case
    noise = np.random.default_rng(0).normal(size=exact.value.shape)
    noisy = exact.assign(value=exact.value + float(exact.value.std()) * noise)
    got = window_lds(noisy, measured)
    for k, step in enumerate((8, 30)):
        predicted = (measured.weight.values - 1) @ noisy.value.sel(step=step).values
        expected = [spearmanr(predicted[:, q], measured.effect[k, :, q])[0] for q in range(3)]
        np.testing.assert_allclose(got.spearman.sel(step=step), expected, rtol=1e-9)
        np.testing.assert_allclose(got.lds.sel(step=step), np.mean(expected), rtol=1e-9)
    assert ((got.lds_lower < got.lds) & (got.lds < got.lds_upper)).all()


def test_labels_not_positions_decide_and_steps_that_were_not_measured_do_not_matter(case):
    _, _, exact, measured = case
    one = measured.sel(step=[30])
    shuffled = exact.isel(train=np.random.default_rng(0).permutation(60), query=[2, 0, 1])
    xr.testing.assert_allclose(window_lds(shuffled, one), window_lds(exact.sel(step=[30]), one))


def test_fresh_batches_are_averaged_and_have_a_standard_error(case):
    task, run, _, _ = case
    small = [dataclasses.replace(run.load(8), optimizer=Optimizer("sgd", 0.05, batch_size=20))]
    measured = window_halves(task, Trajectory.from_checkpoints(small), window=WINDOW, halves=2)
    assert measured.attrs["repeats"] == 4
    assert measured.attrs["batches"] == "fresh"
    assert (measured.effect_stderr > 0).all()


def test_what_cannot_be_is_refused_and_named(case):
    task, run, exact, measured = case
    with pytest.raises(ValueError, match="halves >= 1"):
        window_halves(task, run, window=WINDOW, halves=0)
    with pytest.raises(ValueError, match=r"steps \[9\] have no checkpoint"):
        window_halves(task, run, window=WINDOW, steps=[9])
    one = Task(task.model, task.loss, train=task.train, queries=dict(task.queries), candidates=[3])
    with pytest.raises(ValueError, match="two candidates or more, got 1"):
        window_halves(one, run, window=WINDOW)
    groups = window_influence(task, run, window=WINDOW)
    with pytest.raises(ValueError, match=r"lacks train .*per='sample'"):
        window_lds(groups, measured)
    with pytest.raises(ValueError, match=r"halves give no weight to train \['0'\]"):
        window_lds(exact, measured.drop_sel(train="0"))
    with pytest.raises(ValueError, match=r"lacks step \[8\]"):
        window_lds(exact.sel(step=[30]), measured)
    with pytest.raises(ValueError, match="got 3 halves, expected 4 or more"):
        window_lds(exact, measured.isel(half=slice(3)))
    with pytest.raises(ValueError, match=r"steps \[8\] are not finite"):
        window_lds(exact.assign(value=exact.value.where(exact.step != 8)), measured)
