from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import LABELS, RATE, D, N, Regression, classifier, squared_error

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.training import train_and_record
from stagewise.task import Task


@pytest.mark.parametrize("weight", [0.0, 0.8, 2.0])
def test_the_effect_of_any_weight_is_that_of_gradient_descent_with_a_fixed_normaliser(weight):
    problem = Regression()
    start = np.array([1.0, -0.5, 2.0, 0.3])
    got = window_ablation(problem.task, problem.trajectory(start), window=7, weight=weight)
    unchanged = problem.query_means(problem.after(start, 7, np.ones(N)))
    for label in "abc":
        changed = problem.query_means(problem.after(start, 7, np.where(label == LABELS, weight, 1.0)))
        np.testing.assert_allclose(got.effect.sel(train=label)[0], changed - unchanged, rtol=1e-10)


@pytest.mark.parametrize("window", [1, 10, 200])
def test_a_small_change_at_the_minimum_responds_with_one_minus_decay_over_curvature(window):
    problem, delta = Regression(), 1e-7
    w = problem.minimiser()
    got = window_ablation(problem.task, problem.trajectory(w), window=window, weight=1 - delta)

    sigma, U = np.linalg.eigh(problem.x.T @ problem.x / N)
    response = U @ np.diag((1 - (1 - RATE * sigma) ** window) / sigma) @ U.T
    train = problem.x * (problem.x @ w - problem.y)[:, None]
    query = (problem.xq * (problem.xq @ w - problem.yq)[:, None]).reshape(3, 3, D).mean(1)
    groups = np.stack([train[label == LABELS].sum(0) for label in "abc"])
    expected = groups @ response @ query.T / N
    np.testing.assert_allclose(got.effect[0] / delta, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


def test_down_weighting_the_querys_own_group_is_positive_because_it_helped():
    problem = Regression()
    data = problem.task.train
    same = Task(problem.task.model, squared_error, train=data, queries={"train": data}, train_groups=LABELS)
    effect = window_ablation(same, problem.trajectory(np.full(D, 5.0)), window=3).effect
    assert (effect > 0).all()


ADAM = Optimizer("adam", 0.01)
ORDER = BatchOrder(60, 16, seed=5)


def recorded(task, steps=(10, 30), order=ORDER):
    return Trajectory.from_checkpoints(train_and_record(task, ADAM, order, steps))


@pytest.mark.parametrize("batching", ["stacked", "loop"])
def test_weight_one_has_exactly_no_effect_because_replays_are_paired(batching):
    task = classifier(torch.float32)
    got = window_ablation(task, recorded(task), window=20, weight=1.0, repeats=2, batching=batching)
    assert not got.effect.values.any()
    assert not got.effect_stderr.values.any()


def test_the_unchanged_run_is_the_recorded_one_when_its_order_is_given():
    task = classifier()
    trajectory = recorded(task, (10, 30))
    got = window_ablation(task, trajectory, window=20, steps=[10], order=ORDER, weight=0.0)
    fresh = window_ablation(task, trajectory, window=20, steps=[10], weight=0.0)

    def loss_of_class(params, label):
        losses = task.losses(params, task.queries["val"].batch(slice(None)))
        return losses[torch.from_numpy(task.query_groups["val"] == label)].mean().item()

    without = train_without_class(task, trajectory.load(10), "2", 20)
    expected = [loss_of_class(without, q) - loss_of_class(trajectory.load(30).params, q) for q in "012"]
    np.testing.assert_allclose(got.effect.sel(step=10, train="2"), expected, rtol=1e-9)
    assert not np.allclose(fresh.effect, got.effect, rtol=1e-3)


def train_without_class(task, checkpoint, label, window):
    """Independent of the package: torch.optim.Adam continued from the checkpoint's moments."""
    params = {name: tensor.clone().requires_grad_() for name, tensor in checkpoint.params.items()}
    adam = torch.optim.Adam(params.values(), lr=ADAM.learning_rate)
    for name, tensor in params.items():
        moments = {"exp_avg": checkpoint.first_moment[name], "exp_avg_sq": checkpoint.second_moment[name]}
        copies = {kind: moment.clone() for kind, moment in moments.items()}
        adam.state[tensor] = {"step": torch.tensor(float(checkpoint.step)), **copies}
    keep = torch.from_numpy(task.train_groups != label).double()
    for step in range(checkpoint.step, checkpoint.step + window):
        index = ORDER(step)
        adam.zero_grad()
        ((keep[index] * task.losses(params, task.train.batch(index))).sum() / len(index)).backward()
        adam.step()
    return {name: tensor.detach() for name, tensor in params.items()}


def test_frozen_parameters_are_the_checkpoints_in_training_and_in_evaluation():
    task = classifier(frozen=0)
    elsewhere = {name: tensor + 0.3 for name, tensor in task.state().items()}
    trajectory = Trajectory.from_checkpoints([Checkpoint(0, elsewhere, replace(ADAM, batch_size=16))])
    got = window_ablation(task, trajectory, window=5)
    task.model.load_state_dict(elsewhere)
    np.testing.assert_allclose(got.effect, window_ablation(task, trajectory, window=5).effect, rtol=1e-9)


def test_several_orders_are_averaged_with_their_standard_error():
    task = classifier()
    trajectory = recorded(task, (10,))
    got = window_ablation(task, trajectory, window=8, repeats=4, order=ORDER, seed=1)
    again = window_ablation(task, trajectory, window=8, repeats=4, order=ORDER, seed=1)
    other = window_ablation(task, trajectory, window=8, repeats=4, order=ORDER, seed=2)
    np.testing.assert_array_equal(got.effect, again.effect)
    assert not np.allclose(got.effect, other.effect, rtol=1e-6)
    assert (got.effect_stderr > 0).all()

    seeds = np.random.SeedSequence(1).generate_state(4)[1:]
    singles = [ORDER, *(BatchOrder(60, 16, int(seed)) for seed in seeds)]
    effects = np.stack([window_ablation(task, trajectory, window=8, order=o).effect for o in singles])
    np.testing.assert_allclose(got.effect, effects.mean(0), rtol=1e-9)
    np.testing.assert_allclose(got.effect_stderr, effects.std(0, ddof=1) / 2, rtol=1e-6)


def test_a_full_batch_has_one_order_and_no_spread():
    task = classifier()
    got = window_ablation(task, recorded(task, (10,), BatchOrder(60)), window=5, repeats=3)
    assert "effect_stderr" not in got
    assert got.attrs["repeats"] == 1


def test_trained_in_small_stacks_the_effects_are_the_same():
    task = classifier()
    trajectory = recorded(task)
    whole = window_ablation(task, trajectory, window=6, groups=np.arange(60) % 7)
    parts = window_ablation(task, trajectory, window=6, groups=np.arange(60) % 7, max_replays=3)
    np.testing.assert_allclose(parts.effect, whole.effect, rtol=1e-8, atol=1e-14)


def test_labels_sizes_and_attributes_name_what_was_measured():
    task, calls = classifier(), []
    got = window_ablation(
        task, recorded(task), window=2, groups=["x"] * 20 + ["w"] * 40, progress=lambda *at: calls.append(at)
    )
    assert got.effect.dims == ("step", "train", "query")
    assert got.step.values.tolist() == [10, 30]
    assert got.train.values.tolist() == ["w", "x"]
    assert got.train_size.values.tolist() == [40, 20]
    assert got.train_size.dims == ("train",)
    assert got["query"].values.tolist() == ["0", "1", "2"]
    assert got.attrs["sign"] == "positive = helpful"
    assert got.effect.attrs["units"] == "nats"
    assert calls == [(1, 2), (2, 2)]


def test_without_labels_a_small_training_set_is_ablated_sample_by_sample():
    problem = Regression(train_groups=None)
    got = window_ablation(problem.task, problem.trajectory(np.zeros(D)), window=3, weight=0.0)
    assert got.sizes["train"] == N
    changed = problem.after(np.zeros(D), 3, np.where(np.arange(N) == 11, 0.0, 1.0))
    unchanged = problem.after(np.zeros(D), 3, np.ones(N))
    expected = problem.query_means(changed) - problem.query_means(unchanged)
    np.testing.assert_allclose(got.effect.sel(step=10, train="11"), expected, rtol=1e-9)


def test_an_unknown_batch_size_is_refused_unless_the_order_is_given():
    problem = Regression()
    trajectory = problem.trajectory(np.zeros(D), batch_size=None)
    with pytest.raises(ValueError, match=r"step 10 does not say how many samples.*pass order=BatchOrder"):
        window_ablation(problem.task, trajectory, window=3)
    window_ablation(problem.task, trajectory, window=3, order=BatchOrder(N, 5))


def test_adam_after_step_zero_without_moments_is_refused():
    task = classifier()
    bare = replace(recorded(task).load(30), second_moment={})
    with pytest.raises(ValueError, match=r"step 30 has no second moment.*Recorder"):
        window_ablation(task, Trajectory.from_checkpoints([bare]), window=3)


def test_adam_at_step_zero_needs_no_moments():
    task = classifier()
    start = Checkpoint(0, task.state(), replace(ADAM, batch_size=16))
    window_ablation(task, Trajectory.from_checkpoints([start]), window=3)


@pytest.mark.parametrize("steps", [[11], []])
def test_steps_that_were_not_recorded_are_refused(steps):
    problem = Regression()
    with pytest.raises(ValueError, match=r"no checkpoint; there are \[10\]"):
        window_ablation(problem.task, problem.trajectory(np.zeros(D)), window=3, steps=steps)


def test_a_checkpoint_of_another_model_is_refused():
    problem = Regression()
    with pytest.raises(ValueError, match="shape"):
        window_ablation(problem.task, problem.trajectory(np.zeros(D + 1)), window=3)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"repeats": 0}, {"max_replays": 1}])
def test_impossible_settings_are_refused(wrong):
    problem = Regression()
    with pytest.raises(ValueError, match="need window >= 1"):
        window_ablation(problem.task, problem.trajectory(np.zeros(D)), **{"window": 3, **wrong})
