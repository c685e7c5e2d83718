from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import D, N, Regression, classifier
from torch import nn

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer
from stagewise.dynamics.curves import curves
from stagewise.retraining.leave_out import leave_out, retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.scores import predicted_effect
from stagewise.retraining.training import train_and_record
from stagewise.retraining.unrolling import unroll, unrolled_influence
from stagewise.task import Task

RULES = {
    "sgd": Optimizer("sgd", 0.3),
    "momentum": Optimizer("sgd", 0.1, momentum=0.9, weight_decay=0.02),
    "adam": Optimizer("adam", 0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.03),
    "adamw": Optimizer("adam", 0.02, eps=1e-4, weight_decay=0.1, decoupled=True),
}
ORDERS = {"full batch": BatchOrder(60), "minibatches": BatchOrder(60, 16, seed=5)}


def start_at(task, optimizer, order, step):
    (checkpoint,) = train_and_record(task, optimizer, order, [step])
    return checkpoint


def finite_differences(task, start, order, steps, schedule_of, delta=1e-6, **options):
    """Central differences of retraining in epsilon, with beta = 1 + epsilon on the samples of the schedule."""
    up, down = (retrain(task, start, schedule_of(1 + d), order, steps, **options) for d in (delta, -delta))
    return (up - down) / (2 * delta)


@pytest.mark.parametrize("start_step", [0, 12])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_derivative_of_retraining_through_the_runs_own_optimizer(rule, order, start_step):
    task, order = classifier(), ORDERS[order]
    start = start_at(task, RULES[rule], order, start_step)
    steps = [start_step + k for k in (0, 1, 2, 30)]

    def schedule_of(weight):
        whole = [Schedule.whole_run(range(k, 60, 3), weight) for k in range(3)]
        return [*whole, Schedule.window([4, 7, 50], start_step + 5, 9, weight), Schedule.whole_run([8], weight)]

    got = unroll(task, start, schedule_of(2.0), order, steps)
    expected = finite_differences(task, start, order, steps, schedule_of)
    assert got.dims == expected.dims
    assert not got[0].values.any()
    for replay in range(5):
        size = abs(expected.sel(replay=replay)).max().item()
        np.testing.assert_allclose(got.sel(replay=replay), expected.sel(replay=replay), rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_derivative_of_the_run_with_its_own_changing_learning_rate(rule):
    task, order, steps = classifier(), ORDERS["minibatches"], [13, 20, 42]
    start = start_at(task, RULES[rule], order, 12)
    rate = RULES[rule].learning_rate
    options = {"learning_rate": lambda step: rate * (0.5 + 0.5 * np.cos(np.pi * (step - 12) / 30))}

    def schedule_of(weight):
        return [Schedule.whole_run(range(k, 60, 3), weight) for k in range(3)]

    got = unroll(task, start, schedule_of(2.0), order, steps, **options)
    expected = finite_differences(task, start, order, steps, schedule_of, **options)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * abs(expected).max().item())
    influence = unrolled_influence(task, start, order, steps, **options)
    np.testing.assert_allclose(influence.value, got / 20, rtol=1e-10, atol=1e-16)
    held = unroll(task, start, schedule_of(2.0), order, steps)
    assert abs(held - got).max() > 0.02 * abs(got).max()


def test_a_window_has_no_effect_before_it_and_a_lasting_one_after_it():
    task, order = classifier(), ORDERS["minibatches"]
    start = start_at(task, RULES["adam"], order, 0)
    got = unroll(task, start, [Schedule.window(range(60), 10, 5, 2.0)], order, [10, 11, 40])
    assert not got.sel(step=10).values.any()
    assert got.sel(step=11).values.all()
    assert got.sel(step=40).values.all()


def test_directions_add_up_and_scale_with_the_change_of_weight():
    task, order = classifier(), ORDERS["minibatches"]
    start = start_at(task, RULES["momentum"], order, 0)
    parts = [Schedule.window([1, 2], 3, 4, 2.0), Schedule.whole_run([5], 0.0)]
    both = Schedule(tuple(change for schedule in parts for change in schedule.changes))
    halved = Schedule.window([1, 2], 3, 4, 1.5)
    got = unroll(task, start, [*parts, both, halved], order, [12])[0]
    np.testing.assert_allclose(got[2], got[0] + got[1], rtol=1e-10)
    np.testing.assert_allclose(got[3], got[0] / 2, rtol=1e-10)


def test_a_step_of_gradient_descent_moves_along_minus_the_samples_gradient_over_n():
    problem = Regression(train_groups=None)
    w = np.array([1.0, -0.5, 2.0, 0.3])
    got = unrolled_influence(problem.task, problem.trajectory(w, 0).load(0), BatchOrder(N), [1])
    after = problem.after(w, 1, np.ones(N))
    train = problem.x * (problem.x @ w - problem.y)[:, None]
    query = (problem.xq * (problem.xq @ after - problem.yq)[:, None]).reshape(3, 3, D).mean(1)
    np.testing.assert_allclose(got.value[0], -0.15 * train @ query.T / N, rtol=1e-10, atol=1e-14)


def test_the_influence_of_a_group_is_the_mean_of_its_samples_so_that_the_predicted_effect_is_right():
    task, order = classifier(), ORDERS["full batch"]
    start = start_at(task, RULES["sgd"], order, 0)
    groups = ["big"] * 50 + ["small"] * 10
    got = unrolled_influence(task, start, order, [20], groups=groups)
    single = unrolled_influence(task, start, order, [20], groups=range(60))
    np.testing.assert_allclose(got.value[0, 0], single.value[0, :50].mean("train"), rtol=1e-9)
    measured = leave_out(task, start, order, [20], groups=groups, weight=1 - 1e-5)
    np.testing.assert_allclose(predicted_effect(got, 1 - 1e-5).effect, measured.effect, rtol=1e-3)


def test_influence_during_a_window_is_that_of_the_windows_schedules():
    task, order = classifier(), ORDERS["minibatches"]
    start = start_at(task, RULES["adamw"], order, 0)
    got = unrolled_influence(task, start, order, [8, 30], during=range(5, 12))
    schedules = [Schedule.window(range(k, 60, 3), 5, 7, 2.0) for k in range(3)]
    np.testing.assert_allclose(got.value, unroll(task, start, schedules, order, [8, 30]) / 20, rtol=1e-12)
    assert got.attrs["during"] == [5, 12]


def test_the_result_names_groups_sign_and_units_and_is_accepted_as_a_curve():
    task = classifier()
    got = unrolled_influence(task, start_at(task, RULES["sgd"], BatchOrder(60), 0), BatchOrder(60), [0, 5])
    assert got.value.dims == ("step", "train", "query")
    assert got.train_size.values.tolist() == [20, 20, 20]
    assert not got.stderr.values.any()
    assert got.attrs["estimator"] == "unrolling"
    assert got.attrs["units"] == "nats per unit weight"
    assert got.attrs["sign"].startswith("negative = helpful")
    assert (np.diagonal(got.value.sel(step=5)) < 0).all()
    curves(got)


def test_directions_in_several_passes_are_those_of_one():
    task, order, calls = classifier(), ORDERS["minibatches"], []
    start = start_at(task, RULES["adam"], order, 0)
    whole = unrolled_influence(task, start, order, [9], groups=np.arange(60) % 7)
    parts = unrolled_influence(
        task, start, order, [9], groups=np.arange(60) % 7, max_replays=3, progress=lambda *at: calls.append(at)
    )
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-10, atol=1e-16)
    assert calls == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_parameters_that_never_had_a_gradient_do_not_make_adams_derivative_nan(rule):
    """A dead input: its second moment is exactly 0, where the square root has no slope."""
    task = classifier()
    x, y = task.train.batch(slice(None))
    dead = Task(task.model, task.loss, train=(x.clone().index_fill_(1, torch.tensor(2), 0.0), y), queries={"t": (x, y)})
    optimizer = replace(RULES[rule], weight_decay=0.0)
    start = start_at(dead, optimizer, BatchOrder(60), 0)
    got = unrolled_influence(dead, start, BatchOrder(60), [7], groups=y)
    up, down = (leave_out(dead, start, BatchOrder(60), [7], groups=y, weight=1 + d) for d in (1e-5, -1e-5))
    np.testing.assert_allclose(got.value, (up.effect - down.effect) / (2e-5 * 20), rtol=1e-5)


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean((1, 2, 3))

    x = torch.randn(6, 5, 4, dtype=torch.float64)
    task = Task(Attention().double(), lambda model, batch: model(batch[0]), train=(x,), queries={"train": (x,)})
    start = start_at(task, RULES["sgd"], BatchOrder(6), 0)
    got = unrolled_influence(task, start, BatchOrder(6), [5])
    up, down = (leave_out(task, start, BatchOrder(6), [5], weight=1 + d) for d in (1e-4, -1e-4))
    np.testing.assert_allclose(got.value, (up.effect - down.effect) / 2e-4, rtol=1e-5)


def test_losses_that_are_linear_in_the_parameters_have_no_curvature_to_carry():
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task = Task(model, lambda model, batch: model(batch[0])[:, 0], train=(x,), queries={"train": (x,)})
    start = start_at(task, RULES["sgd"], BatchOrder(4), 0)
    got = unrolled_influence(task, start, BatchOrder(4), [10])
    np.testing.assert_allclose(got.value[0, :, 0], -10 * 0.3 * (x @ x.mean(0)) / 4, rtol=1e-12)


def test_impossible_requests_are_refused():
    problem = Regression()
    start = problem.trajectory(np.zeros(D), 10).load(10)
    with pytest.raises(ValueError, match=r"step 10, got \[9\]"):
        unrolled_influence(problem.task, start, BatchOrder(N), [9])
    with pytest.raises(ValueError, match="one schedule or more"):
        unroll(problem.task, start, [], BatchOrder(N), [12])
    for during in (range(5, 5), range(0, 10, 2)):
        with pytest.raises(ValueError, match="range of consecutive updates"):
            unrolled_influence(problem.task, start, BatchOrder(N), [12], during=during)
    for during in (range(4, 10), range(12, 20)):
        with pytest.raises(ValueError, match=r"lies outside the updates from step 10 to step 12"):
            unrolled_influence(problem.task, start, BatchOrder(N), [12], during=during)
    for during in (range(4, 11), range(11, 20)):
        assert unrolled_influence(problem.task, start, BatchOrder(N), [12], during=during).value.values.any()
    with pytest.raises(CheckpointError, match="shape"):
        unrolled_influence(problem.task, problem.trajectory(np.zeros(D + 1)).load(10), BatchOrder(N), [12])
    with pytest.raises(ValueError, match="does not say which optimizer"):
        unroll(problem.task, Checkpoint(10, start.params), [Schedule()], BatchOrder(N), [12])
