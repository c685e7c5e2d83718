"""The numbers that a run stores, each against arithmetic on springs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import springs
import torch
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.two_times import influence_in_time
from stagewise.retraining.window_influence import window_influence
from stagewise.run import analysis, estimators, exemplars
from stagewise.run.analysis import Analysis
from stagewise.run.config import make_config
from stagewise.run.engine import sample
from stagewise.run.progress import silent
from stagewise.sampling.posterior import LocalPosterior

WINDOW = 3


def config(**changes):
    return make_config({"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": WINDOW}} | changes)


class Steps:
    """Remembers the progress that was made."""

    def __init__(self):
        self.seen = []

    def __call__(self, what, done, total):
        self.seen.append((what, done, total))


class Forgetful:
    """Keeps nothing."""

    def get(self, _name, _cause, compute):
        return compute()


def asked(task, run, settings, steps, progress=silent):
    return Analysis(task, run, settings, dict.fromkeys(steps, "digest"), Forgetful(), progress)


def baselines(*given):
    found = estimators.without_chains(asked(*given))
    return found.curves, found.left_out


def measure(*given):
    return analysis.measure(asked(*given))


# Mean losses


@pytest.mark.parametrize("forward_batch", [2048, 4])
def test_mean_losses_are_those_of_every_set_at_every_asked_step_however_batched(forward_batch):
    task = springs.task(forward_batch=forward_batch)
    found = analysis.mean_losses(task, springs.trajectory(), [20, 0])
    assert found["step"].values.tolist() == [20, 0]
    assert found["query"].values.tolist() == ["near:first", "near:second", "far"]
    for step in (20, 0):
        one = found.sel(step=step)
        np.testing.assert_allclose(one["train"], springs.loss(step, springs.TRAIN).mean())
        np.testing.assert_allclose(
            one["queries"], [*springs.loss(step, springs.NEAR), *springs.loss(step, springs.FAR)]
        )


def test_mean_loss_of_a_sample_of_tokens_is_the_mean_over_its_tokens():
    found = analysis.mean_losses(springs.task(springs.by_token), springs.trajectory(), [10])
    np.testing.assert_allclose(found["train"], [springs.loss(10, springs.TRAIN).mean() / 2])
    np.testing.assert_allclose(found["queries"].sel(query="far"), springs.loss(10, springs.FAR) / 2)


def test_a_large_training_set_is_represented_by_some_of_it_evenly_spaced_and_that_is_said(monkeypatch):
    monkeypatch.setattr(analysis, "CURVATURE_SAMPLES", 3)
    found = analysis.mean_losses(springs.task(), springs.trajectory(), [10])
    np.testing.assert_allclose(found["train"], [springs.loss(10, springs.TRAIN[[0, 2, 4]]).mean()])
    assert found.attrs["train_samples"] == 3
    monkeypatch.undo()
    assert "train_samples" not in analysis.mean_losses(springs.task(), springs.trajectory(), [10]).attrs


def test_rates_are_summed_over_the_updates_between_the_asked_steps_where_each_is_known():
    def run(*rates):
        plain = springs.trajectory()
        known = zip(plain.steps, ((), *rates), strict=True)
        return Trajectory.from_checkpoints(replace(plain.load(step), learning_rates=made) for step, made in known)

    whole = run((0.1,) * 10, tuple(0.01 * k for k in range(10)))
    sums = analysis.mean_losses(springs.task(), whole, [0, 10, 20])["rates"]
    np.testing.assert_allclose(sums, [0, 1, 1.45])
    np.testing.assert_allclose(analysis.mean_losses(springs.task(), whole, [10, 20])["rates"], [0, 0.45])
    for task_steps, partly in (([0, 20], whole), ([20, 0], whole), ([0, 10, 20], run((0.1,) * 10, (0.1,) * 9))):
        assert "rates" not in analysis.mean_losses(springs.task(), partly, task_steps)


# Baselines


def test_baselines_are_the_estimators_they_are_called_by_at_every_step():
    task, run, posterior, steps = springs.task(), springs.trajectory(), LocalPosterior(window=WINDOW), Steps()
    found, left_out = baselines(task, run, config(), [0, 20], steps)
    assert not left_out
    assert list(found) == ["exact influence", "damped influence", "gradient product"]
    for name, estimator in (("gradient product", gradient_product), ("damped influence", damped_influence)):
        xr.testing.assert_allclose(found[name], estimator(task, run, posterior, steps=[0, 20]))
    exact = window_influence(task, run, window=WINDOW, steps=[0, 20], check=True)  # four fresh orders
    xr.testing.assert_allclose(found["exact influence"], exact)
    # -(rate W / n) (w - x_i) . (w - x_j) at w = 0, mean over the pairs of two groups
    near, group = springs.NEAR[0], springs.TRAIN[::2].mean(0)
    value = found["gradient product"]["value"].sel(step=0, train="a", query="near:first")
    np.testing.assert_allclose(value, -springs.RATE * WINDOW / 6 * near @ group)
    assert steps.seen == [(name, done, 2) for name in found for done in (1, 2)]


def test_exact_influence_replays_the_orders_that_are_retrained_and_that_of_samples_too():
    task, run = springs.task(), springs.trajectory()
    own = config(estimators=["exact"], retraining={"recorded_order_seed": 3}, posterior={"window": WINDOW})
    options = {"window": WINDOW, "steps": [10], "order": BatchOrder(6, 2, 3)}
    found, _ = baselines(task, run, own, [10])
    xr.testing.assert_allclose(found["exact influence"], window_influence(task, run, **options))
    assert not found["exact influence"].stderr.any()
    two = config(estimators=["exact"], retraining={"recorded_order_seed": 3, "repeats": 2})
    found, _ = baselines(task, run, two, [10])
    xr.testing.assert_allclose(found["exact influence"], window_influence(task, run, **options, repeats=2))
    samples = estimators.exact_samples(asked(task, run, own, [10]), [10], ["far"])
    expected = window_influence(task, run, **options, per="sample").sel(query=["far"])
    xr.testing.assert_allclose(samples, expected)


def test_influence_in_two_times_is_asked_at_some_checkpoints_in_bins_between_all():
    task, run = springs.task(), springs.trajectory()
    own = config(two_times=1, retraining={"recorded_order_seed": 3})
    found = analysis.in_two_times(asked(task, run, own, run.steps))
    expected = influence_in_time(task, run.load(0), BatchOrder(6, 2, 3), [10], bins=[0, 10])
    assert run.steps == (0, 10, 20)
    xr.testing.assert_allclose(found, expected)
    both = analysis.in_two_times(asked(task, run, own.model_copy(update={"two_times": 2}), run.steps))
    assert both.asked.values.tolist() == [10, 20]
    assert both.trained.values.tolist() == [0, 10]


def test_influence_in_two_times_without_the_runs_own_batches_or_with_one_checkpoint_says_what_is_needed():
    task, run = springs.task(), springs.trajectory()
    with pytest.raises(ValueError, match=r"record them, recorder\(step, indices\)"):
        analysis.in_two_times(asked(task, run, config(two_times=1), run.steps))
    with pytest.raises(ValueError, match="two checkpoints or more"):
        analysis.in_two_times(asked(task, run, config(two_times=1), [10]))


def test_exact_influence_without_a_window_is_left_out_with_the_setting_to_change():
    loose = config(estimators=["exact"], posterior={"gamma": 1.0})
    found, left_out = baselines(springs.task(), springs.trajectory(), loose, [10])
    assert not found
    assert "set posterior.window" in left_out["exact influence"]


def test_only_the_baselines_that_are_asked_for_are_computed():
    found, _ = baselines(springs.task(), springs.trajectory(), config(estimators=["damped"]), [10], silent)
    assert list(found) == ["damped influence"]


# Measured effects


def by_hand(step, window, weight, order):
    """Effect (train, query) of each group at another weight: SGD on springs, number by number."""

    def end(changed):
        w = np.array(springs.PLACES[step])
        for now in range(step, step + window):
            pulls = [
                (weight if changed is not None and i % 2 == changed else 1.0) * (w - springs.TRAIN[i])
                for i in order(now)
            ]
            w = w - springs.RATE * np.mean(pulls, 0)
        return np.array([((w - x) ** 2).sum() / 2 for x in [*springs.NEAR, *springs.FAR]])

    return np.array([end(group) - end(None) for group in (0, 1)])


def test_nothing_is_measured_unless_asked_for():
    assert measure(springs.task(), springs.trajectory(), config(), [0]) == {}


@pytest.mark.parametrize("seed", [3, 4])
def test_effects_are_measured_in_the_recorded_order_with_the_weight_and_window_that_are_set(seed):
    settings = config(retraining={"weight": 0.3, "window": 5, "repeats": 1, "recorded_order_seed": seed})
    steps = Steps()
    found = measure(springs.task(), springs.trajectory(), settings, [0, 10], steps)["measured"]
    for step in (0, 10):
        expected = by_hand(step, 5, 0.3, BatchOrder(6, 2, seed))
        np.testing.assert_allclose(found["effect"].sel(step=step), expected, atol=1e-12)
    assert (found.attrs["window"], found.attrs["weight"]) == (5, 0.3)
    assert steps.seen == [(what, k, 2) for what in ("retraining windows", "repeating the run") for k in (1, 2)]


def test_window_of_retraining_is_that_of_the_posterior_by_default():
    full = springs.trajectory(batch_size=0)
    found = measure(springs.task(), full, config(retraining={}), [10])["measured"]
    expected = by_hand(10, WINDOW, 0.8, BatchOrder(6))
    np.testing.assert_allclose(found["effect"].sel(step=10), expected, atol=1e-12)


def test_repeats_are_averaged_over_other_orders_than_the_recorded_one():
    settings = config(retraining={"repeats": 3, "recorded_order_seed": 3})
    found = measure(springs.task(), springs.trajectory(), settings, [0])["measured"]
    assert (found["effect_stderr"] > 0).all()
    one = measure(
        springs.task(), springs.trajectory(), config(retraining={"repeats": 1, "recorded_order_seed": 3}), [0], silent
    )["measured"]
    assert (abs(found["effect"] - one["effect"]) > 1e-6).all()


def test_how_well_the_run_is_repeated_stands_beside_what_was_measured():
    settings = config(retraining={"weight": 0.3, "repeats": 1, "recorded_order_seed": 3})
    found = measure(springs.task(), springs.trajectory(), settings, [0, 10])["replay"]
    assert found["step"].values.tolist() == [0, 10]
    assert "misses" in found.attrs["verdict"]
    unknown = measure(springs.task(), springs.trajectory(), config(retraining={"repeats": 1}), [0])
    assert "a like run, not this one" in unknown["replay"].attrs["verdict"]


def test_a_baseline_that_cannot_be_computed_anywhere_is_left_out_with_its_reason():
    checkpoint = springs.trajectory().load(0)
    broken = type(springs.trajectory()).from_checkpoints([type(checkpoint)(0, checkpoint.params)])
    found, left_out = baselines(springs.task(), broken, config(estimators=["gradient"]), [0])
    assert not found
    assert "no record of its optimiser" in left_out["gradient product"]


def test_retraining_without_any_window_says_where_to_set_it():
    with pytest.raises(ValueError, match=r"retraining\.window"):
        measure(springs.task(), springs.trajectory(), config(posterior={"gamma": 1.0}, retraining={}), [0], silent)


# Exemplars


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A run of springs, and its influence between single samples, as an influence of groups would come."""
    run = springs.task(), springs.trajectory(), LocalPosterior(window=WINDOW)
    folder = tmp_path_factory.mktemp("springs")
    return sample(*run[:2], posterior=run[2], out=folder, chains=16, draws=64, batching="stacked")


def influence(**curves):
    """(step, train, query) with the given curve of one train group on each query."""
    value = np.array(list(curves.values())).T[:, None]
    names = [name.replace("_", ":") for name in curves]
    return xr.Dataset(
        {"value": (("step", "train", "query"), value)}, {"step": [0, 10, 20], "train": ["a"], "query": names}
    )


def of_chains(store):
    return partial(estimators.sampled_samples, asked(springs.task(), springs.trajectory(), config(), []), store)


FLAT = influence(near_first=[1, 2, 3], near_second=[5, 5, 5], far=[0, 4, 8])


def test_exemplars_are_the_most_helpful_and_the_most_harmful_samples_in_order(sampled):
    found = exemplars.exemplars(springs.task(), of_chains(sampled), FLAT, 2, steps=1, queries=2)
    by_query = {exemplar.query: exemplar for exemplar in found}
    # At w = 0 samples on the query's side help it: those with the largest x for near, with the smallest for far.
    assert list(by_query["near:first"].samples) == [0, 4, 1, 5]
    assert list(by_query["far"].samples) == [1, 5, 0, 4]
    for exemplar in found:
        assert exemplar.step == 0
        assert np.array(exemplar.values[:2]).max() < 0 < np.array(exemplar.values[2:]).min()
        assert list(exemplar.labels) == ["ab"[i % 2] for i in exemplar.samples]
        assert exemplar.images is None


def test_values_of_exemplars_are_those_of_single_samples_at_their_step_with_their_errors(sampled):
    found = exemplars.exemplars(springs.task(), of_chains(sampled), FLAT, 1, steps=2, queries=1)
    assert [(exemplar.query, exemplar.step) for exemplar in found] == [("far", 0), ("far", 20)]
    for exemplar in found:
        # Exact: -(1/n) (w - x_i) . (w - x_j) / (1 + 1/(rate W)).
        gradients, query = springs.PLACES[exemplar.step] - springs.TRAIN, springs.PLACES[exemplar.step] - springs.FAR[0]
        exact = -gradients @ query / (1 + 1 / (springs.RATE * WINDOW)) / 6
        for i, value, stderr in zip(exemplar.samples, exemplar.values, exemplar.stderrs, strict=True):
            assert 0 < stderr < 0.2 * abs(exact).max()
            assert abs(value - exact[i]) < 4 * stderr


def test_exemplars_are_of_the_queries_that_change_most_at_steps_from_first_to_last(sampled):
    found = exemplars.exemplars(springs.task(), of_chains(sampled), FLAT, 1, steps=2, queries=2)
    assert [(e.query, e.step) for e in found] == [("far", 0), ("far", 20), ("near:first", 0), ("near:first", 20)]


def test_samples_are_ranked_by_how_certain_they_are_and_by_size_where_all_are_certain():
    value, stderr = np.array([-5.0, -4.0, 3.0, 6.0, 0.0, 1.0]), np.array([50.0, 1.0, 0.1, 60.0, 0.0, 1.0])
    dims = ("step", "train", "query")
    made = xr.Dataset(
        {"value": (dims, value[None, :, None]), "stderr": (dims, stderr[None, :, None])},
        {"step": [0], "train": list("012345"), "query": ["far"]},
    )
    (exemplar,) = exemplars.exemplars(springs.task(), lambda *_: made, FLAT, 2, steps=1, queries=1)
    assert list(exemplar.samples) == [1, 0, 2, 5]
    sure = made.assign(stderr=0 * made["stderr"])
    (exemplar,) = exemplars.exemplars(springs.task(), lambda *_: sure, FLAT, 2, steps=1, queries=1)
    assert list(exemplar.samples) == [0, 1, 3, 2]


def test_samples_without_labels_get_none_and_no_exemplars_are_made_if_none_are_asked_for(sampled):
    bare = springs.task(train_groups=None)
    (exemplar,) = exemplars.exemplars(bare, of_chains(sampled), FLAT, 1, steps=1, queries=1)
    assert list(exemplar.labels) == ["", ""]
    assert exemplars.exemplars(bare, of_chains(sampled), FLAT, 0) == []
    assert exemplars.exemplars(bare, of_chains(sampled), FLAT.isel(query=0), 3) == []


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 4, 5), (2, 4, 5)),
        ((6, 1, 4, 5), (2, 4, 5)),
        ((6, 3, 4, 5), (2, 4, 5, 3)),
        ((6, 2, 4, 5), None),
        ((6, 3, 5), None),
        ((6, 4), None),
    ],
)
def test_samples_that_look_like_pictures_are_shown_as_such_from_black_to_white(shape, expected):
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    shown = exemplars.images(springs.task(train=(x,), train_groups=None).train, [5, 1])
    if expected is None:
        assert shown is None
        return
    assert shown.shape == expected
    assert (shown.min(), shown.max()) == (0, 1)
    assert shown[0].min() > shown[1].max()  # sample 5 before sample 1


def test_pictures_of_whole_numbers_are_not_taken_for_pictures():
    tokens = torch.zeros(6, 8, 8, dtype=torch.long)
    assert exemplars.images(springs.task(train=(tokens,), train_groups=None).train, [0]) is None


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [2]), (2, [2, 11]), (3, [2, 5, 11]), (4, [2, 3, 7, 11]), (9, [2, 3, 5, 7, 11])]
)
def test_spread_takes_the_ends_and_what_lies_evenly_between(count, expected):
    assert analysis.spread([2, 3, 5, 7, 11], count) == expected
