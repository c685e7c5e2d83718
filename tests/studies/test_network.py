"""The network's starts, its task with repeated and noisy items, and the runs that are recorded of it."""

import numpy as np
import pytest
import torch

from stagewise.influence.bif import bif
from stagewise.influence.gradients import gradient_product
from stagewise.retraining.leave_out import leave_out, retrain
from stagewise.retraining.schedule import Schedule
from stagewise.run.engine import sample
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.hierarchy.network import FIRST, SECOND, input_output_correlation, optimizer, record, task
from stagewise.studies.hierarchy.theory.modes import Modes
from stagewise.studies.hierarchy.theory.tree import KINGDOMS, LOPSIDED, Concept, Items

RATE = 0.01
ITEMS = Items.of(KINGDOMS)
VARIED = {
    "kingdoms": ITEMS,
    "lopsided": Items.of(LOPSIDED),
    "repeated": Items.of(KINGDOMS, counts={"cat": 3, "oak": 2}),
    "noisy": Items.of(KINGDOMS, noise=0.3, seed=2),
    "fewer features than items": Items.of(KINGDOMS, diffused=3, seed=1),
    "one leaf": Items.of(Concept("only")),
}


def weights(network):
    state = network.state()
    return state[FIRST].numpy(), state[SECOND].numpy()


def trained(items, last, kept=(0,), name="sgd", rate=RATE, **settings):
    network = task(items, **settings)
    return record(network, optimizer(items, name, rate), last, kept)


def item_losses(run, step):
    """Of the queries, from the recorded weights."""
    first, second = (layer[0] for layer in run.layers([step]))
    targets = run.task.queries["items"].batch(slice(None))[1].numpy().T
    return ((second @ first - targets) ** 2).sum(0) / 2


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("seed", [0, 1])
def test_aligned_start_has_strength_a0_in_every_mode_and_no_mixing(name, seed):
    items, a0 = VARIED[name], 3e-4
    first, second = weights(task(items, start="aligned", a0=a0, seed=seed))
    data = input_output_correlation(items)
    modes, there = Modes.of(data), min(data.shape)
    strengths = modes.u.T @ second @ first @ modes.v
    np.testing.assert_allclose(strengths[:there, :there], a0 * np.eye(there), atol=1e-12)
    assert abs(strengths[there:]).max(initial=0) < 1e-12
    np.testing.assert_allclose(modes.initial(first, second)[:there, :there], a0 * np.eye(there), atol=1e-12)
    # balanced: what either layer holds, the other does too
    np.testing.assert_allclose(first @ first.T, second.T @ second, atol=1e-12)


def test_aligned_starts_of_two_seeds_differ_by_a_rotation_of_the_hidden_units_only():
    (first, second), (other, behind) = (weights(task(ITEMS, start="aligned", seed=seed)) for seed in (0, 1))
    assert abs(first - other).max() > 1e-3
    np.testing.assert_allclose(second @ first, behind @ other, atol=1e-15)


def test_random_start_has_the_variance_that_gives_modes_the_strength_a0_on_average():
    width, a0 = 4096, 1e-4
    first, second = weights(task(ITEMS, width=width, a0=a0, seed=3))
    for layer in (first, second):
        assert layer.var() * width / (2 * a0) == pytest.approx(1, abs=0.04)
        assert abs(layer.mean()) < 5 * layer.std() / layer.size**0.5
    strengths = Modes.of(ITEMS.targets.T).initial(first, second)
    np.testing.assert_allclose(np.diagonal(strengths), a0, rtol=0.1)


def test_random_starts_depend_on_the_seed_and_on_nothing_else():
    first, same, other = (weights(task(ITEMS, seed=seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert abs(first - other).max() > 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        np.testing.assert_array_equal(weights(task(ITEMS, seed=0))[0], first)


@pytest.mark.parametrize("a0", [0.0, -1e-4, float("nan")])
@pytest.mark.parametrize("start", ["aligned", "random"])
def test_start_without_strength_is_refused_by_its_value(a0, start):
    with pytest.raises(ValueError, match=f"need 0 < a0 < inf.*got {a0}"):
        task(ITEMS, a0=a0, start=start)


def test_network_without_hidden_units_is_refused():
    with pytest.raises(ValueError, match=r"width >= 1.*, 0 and"):
        task(ITEMS, width=0)


def test_input_output_correlation_counts_every_time_that_an_item_is_shown():
    items = VARIED["repeated"]
    shown = np.ones(8)
    shown[items.names.index("cat")], shown[items.names.index("oak")] = 3, 2
    np.testing.assert_array_equal(input_output_correlation(items), items.targets.T * shown)
    noisy = VARIED["noisy"]
    np.testing.assert_array_equal(input_output_correlation(noisy), noisy.shown_targets.T)


def test_item_shown_three_times_is_an_item_of_weight_three():
    cat = ITEMS.names.index("cat")
    repeated, once = trained(Items.of(KINGDOMS, counts={"cat": 3}), 400), trained(ITEMS, 400)
    np.testing.assert_array_equal(repeated.weights[0], once.weights[0])
    steps = [100, 200, 400]
    weighted = retrain(once.task, once.start, [Schedule.whole_run([cat], 3.0)], once.order, steps)
    measured = [item_losses(repeated, step) for step in steps]
    np.testing.assert_allclose(measured, weighted.sel(replay=0, query=ITEMS.names).values, rtol=1e-9)
    assert not np.allclose(measured, [item_losses(once, step) for step in steps], rtol=0.01)


def test_all_samples_of_a_repeated_item_make_up_its_train_group():
    run = trained(VARIED["repeated"], 150, [0])
    effects = leave_out(run.task, run.start, run.order, [150])
    sizes = dict(zip(effects["train"].values.tolist(), effects["train_size"].values.tolist(), strict=True))
    assert sizes == dict.fromkeys(ITEMS.names, 1) | {"cat": 3, "oak": 2}
    assert sorted(effects["query"].values) == sorted(ITEMS.names)


def test_label_noise_is_learnt_from_the_training_set_and_judged_by_the_truth():
    items = VARIED["noisy"]
    run = trained(items, 3000, rate=0.02)
    shown, truth = (data.batch(slice(None))[1].numpy() for data in (run.task.train, run.task.queries["items"]))
    np.testing.assert_array_equal(truth, items.targets)
    np.testing.assert_array_equal(shown, items.shown_targets)
    first, second = (layer[-1] for layer in run.layers([3000]))
    assert abs(second @ first - shown.T).max() < 1e-3
    np.testing.assert_allclose(item_losses(run, 3000), ((shown - truth) ** 2).sum(1) / 2, rtol=0.02)


@pytest.mark.parametrize("features", [3, 20])
def test_diffused_features_are_learnt_whether_they_are_more_than_the_items_or_fewer(features):
    items = Items.of(KINGDOMS, diffused=features, seed=1)
    run = trained(items, 2000)
    assert item_losses(run, 0).min() > 0.4 * features
    assert item_losses(run, 2000).max() < 1e-3


@pytest.mark.parametrize("start", ["aligned", "random"])
def test_tree_of_one_leaf_trains_and_helps_itself_by_every_measure(start, tmp_path):
    run = trained(VARIED["one leaf"], 400, [100, 300], rate=0.02, start=start)
    assert item_losses(run, 400) < 1e-4
    effects = leave_out(run.task, run.start, run.order, [300])
    assert effects["effect"].item() == pytest.approx(0.5, abs=0.03)
    window = LocalPosterior(window=20, n_beta=1000.0)
    products = gradient_product(run.task, run.trajectory, window)
    sampling = {"chains": 8, "draws": 16, "batching": "stacked"}
    traces = sample(run.task, run.trajectory, posterior=window, out=tmp_path, **sampling)
    for influence in (products, bif(traces, trusted_only=False)):
        assert influence["value"].shape == (2, 1, 1)
        assert (influence["value"] < 0).all()


def test_record_keeps_every_step_from_zero_and_the_wanted_checkpoints():
    run = trained(ITEMS, 12, [0, 5, 12])
    assert run.trajectory.steps == (0, 5, 12)
    assert run.weights.shape == (13, 32 * (8 + 15))
    assert not run.weights.requires_grad
    for step in run.trajectory.steps:
        saved, (first, second) = run.trajectory.load(step).params, run.layers([step])
        np.testing.assert_array_equal(saved[FIRST], first[0])
        np.testing.assert_array_equal(saved[SECOND], second[0])
    np.testing.assert_array_equal(run.layers([0])[0][0], weights(run.task)[0])
    np.testing.assert_array_equal(run.representations([12])[0].T, run.layers([12])[0][0])
    assert len({tuple(row) for row in run.weights.tolist()}) == 13


def test_step_of_sgd_is_the_rate_times_the_gradient_of_the_sum_of_losses():
    items = VARIED["repeated"]
    run = trained(items, 1, a0=0.1)
    (w1, after1), (w2, after2) = run.layers()
    shown = np.bincount(items.shown)
    residual = (items.targets.T - w2 @ w1) * shown
    np.testing.assert_allclose(after1 - w1, RATE * w2.T @ residual, atol=1e-14)
    np.testing.assert_allclose(after2 - w2, RATE * residual @ w1.T, atol=1e-14)


@pytest.mark.parametrize(("name", "rate"), [("sgd", RATE), ("adam", 1e-3)])
def test_run_goes_on_from_its_checkpoints_as_if_it_had_not_stopped(name, rate):
    """Adam that lost its moments or its count of steps would jump."""
    run = trained(ITEMS, 240, [0, 100, 200], name, rate)
    for step in (0, 100, 200):
        later = [step + 1, step + 40]
        losses = retrain(run.task, run.trajectory.load(step), [Schedule()], run.order, later).sel(replay=0)
        expected = [item_losses(run, at) for at in later]
        np.testing.assert_allclose(losses.sel(query=ITEMS.names).values, expected, rtol=1e-9)


def test_adam_run_learns_at_its_rate_whatever_the_number_of_samples():
    run = trained(VARIED["repeated"], 1500, [1500], "adam", 1e-3)
    steps = (run.weights[1] - run.weights[0]).abs()
    np.testing.assert_allclose(steps.max(), 1e-3, rtol=1e-3)  # Adam's first step is its rate
    assert item_losses(run, 1500).max() < 0.05
    assert run.trajectory.load(1500).second_moment.keys() == {FIRST, SECOND}


def test_float32_is_float32_throughout_and_follows_float64():
    single, double = (trained(ITEMS, 300, [300], dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single.weights.dtype == torch.float32
    assert {tensor.dtype for tensor in single.trajectory.load(300).params.values()} == {torch.float32}
    for data in (single.task.train, single.task.queries["items"]):
        assert {tensor.dtype for tensor in data.batch(slice(None))} == {torch.float32}
    np.testing.assert_allclose(single.weights[0], double.weights[0], rtol=1e-6)
    np.testing.assert_allclose(item_losses(single, 300), item_losses(double, 300), rtol=1e-3)


def test_misspelt_start_infinite_strength_and_checkpoints_outside_the_run_are_refused():
    items = Items.of(KINGDOMS)
    with pytest.raises(ValueError, match=r"start in .*'alinged'"):
        task(items, start="alinged")
    with pytest.raises(ValueError, match="a0 < inf"):
        task(items, start="aligned", a0=float("inf"))
    with pytest.raises(ValueError, match=r"between step 0 and 10, got \[-3, 50\]"):
        record(task(items), optimizer(items, "sgd", 0.004), 10, [-3, 5, 50])


def test_building_a_network_leaves_the_callers_random_numbers_alone():
    before = torch.random.get_rng_state()
    task(Items.of(KINGDOMS))
    assert torch.equal(before, torch.random.get_rng_state())
