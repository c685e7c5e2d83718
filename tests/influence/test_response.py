from dataclasses import replace

import numpy as np
import pytest
import torch
from regression import Regression
from small_networks import LOSSES, Problem
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.damped import damped_influence
from stagewise.influence.response import response_influence
from stagewise.retraining.window_influence import window_influence
from stagewise.sampling.metric import clip_factor
from stagewise.sampling.posterior import LocalPosterior, window_response
from stagewise.task import Task

BY_SAMPLE = {"query_groups": {"val": range(4)}}
PLACES = ("path", "checkpoint")
SETTLED = 100_000  # updates after which Adam's bias correction is over
RATES = [0.3, 0.2, 0.05]
OPTIMIZERS = {
    "sgd": Optimizer("sgd", 0.4, batch_size=0),
    "momentum": Optimizer("sgd", 0.1, momentum=0.9, batch_size=0),
    "adam": Optimizer("adam", 0.05, batch_size=0),
    "clipped": Optimizer("adam", 0.05, batch_size=0, clip_norm=0.01),
}


def at_checkpoint(problem, window, **options):
    posterior = LocalPosterior(window=window)
    return response_influence(problem.task, problem.trajectory, posterior, at="checkpoint", **options)


def restarted(problem, optimizer, coming=()):
    """The problem with another optimiser and coming rates."""
    second = problem.checkpoint.second_moment
    problem.checkpoint = Checkpoint(SETTLED, problem.params, optimizer, {}, second).followed_by(coming)
    problem.trajectory = Trajectory.from_checkpoints([problem.checkpoint])
    return problem


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize(("curvature", "coming"), [("hessian", RATES), ("gauss_newton", ())])
def test_every_eigen_direction_responds_as_the_optimiser_does(rule, coming, curvature):
    optimizer = OPTIMIZERS[rule]
    problem = restarted(Problem(optimizer=optimizer.name, step=SETTLED, **BY_SAMPLE), optimizer, coming)
    dense = problem.dense()
    root = np.sqrt(problem.metric())
    matrix = root[:, None] * (dense.hessian if curvature == "hessian" else dense.gauss_newton) * root
    values, vectors = np.linalg.eigh(matrix)
    assert (values[0] < -1e-3) == (curvature == "hessian")
    point = LocalPosterior(window=12).at(problem.task, problem.checkpoint)
    clip = clip_factor(replace(point, anchor=None, scale=None), optimizer) if optimizer.clip_norm else 1.0
    assert (clip < 1) == (rule == "clipped")
    response = clip * window_response(clip * values, 12, optimizer, coming)
    expected = -((dense.train * root) @ vectors * response) @ (dense.query * root @ vectors).T / 11
    got = at_checkpoint(problem, 12, curvature=curvature)
    np.testing.assert_allclose(got["value"][0], expected, rtol=1e-7, atol=1e-12)
    assert not got["stderr"].any()
    assert got.attrs["estimator"] == f"response ({curvature})"


def test_negative_curvature_beyond_every_posterior_is_answered():
    problem = Problem(rate=0.05)
    with pytest.raises(ValueError, match="not localised"):
        damped_influence(problem.task, problem.trajectory, LocalPosterior(window=100), curvature="hessian")
    assert np.isfinite(at_checkpoint(problem, 100)["value"]).all()


@pytest.mark.parametrize("rate", [100.0, 1e60])
def test_updates_that_run_away_are_left_out_with_what_to_do(rate):
    """Steps far too long for the curvature, up to what is not a number."""
    problem = Problem(rate=rate)
    with pytest.raises(
        ValueError, match=r"run away at fixed curvature: they go \S+ times as far .* use a shorter window"
    ):
        at_checkpoint(problem, 8)


def test_a_query_without_gradient_gets_no_influence_and_is_no_reason_to_refuse():
    random = np.random.default_rng(0)
    x, xq = random.normal(size=(6, 3)), np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    problem = Regression(x, x[:, 0], xq, np.ones(2), np.ones(3), train_groups=range(6), query_groups={"val": range(2)})
    found = response_influence(problem.task, problem.trajectory(), LocalPosterior(window=5))["value"][0]
    assert not found[:, 0].any()
    assert (found[:, 1] != 0).all()


def test_a_window_is_asked_for():
    problem = Problem()
    with pytest.raises(ValueError, match="LocalPosterior\\(window=...\\), not gamma="):
        response_influence(problem.task, problem.trajectory, LocalPosterior(gamma=1.0))


def test_one_update_is_the_damped_form_of_no_curvature():
    problem = Problem("tokens", **BY_SAMPLE)
    one = at_checkpoint(problem, 1)
    dense = problem.dense()
    np.testing.assert_allclose(one["value"][0], -0.1 * dense.train @ dense.query.T / 11, rtol=1e-9, atol=1e-15)


# At the minimum of a quadratic loss, at w = 0, nothing that is held changes: the replay's derivative is the response.
AT_REST = {
    "sgd": Optimizer("sgd", 0.3, batch_size=0),
    "momentum": Optimizer("sgd", 0.1, momentum=0.9, batch_size=0),
    "momentum, L2": Optimizer("sgd", 0.1, momentum=0.9, weight_decay=0.5, batch_size=0),
    "Adam": Optimizer("adam", 0.2, eps=1.0, batch_size=0),
    "Adam, L2": Optimizer("adam", 0.2, eps=1.0, weight_decay=0.5, batch_size=0),
    "AdamW": Optimizer("adam", 0.2, eps=1.0, weight_decay=0.5, decoupled=True, batch_size=0),
}


@pytest.mark.parametrize("rule", AT_REST)
@pytest.mark.parametrize(("at", "coming"), [("checkpoint", ()), ("path", RATES)])
def test_at_the_minimum_of_a_quadratic_loss_it_is_the_derivative_of_the_replay(rule, coming, at):
    random = np.random.default_rng(0)
    x, xq, yq = random.normal(size=(6, 3)), random.normal(size=(2, 3)), random.normal(size=2)
    y = random.normal(size=6)
    y -= x @ np.linalg.lstsq(x, y, rcond=None)[0]
    problem = Regression(x, y, xq, yq, np.zeros(3), train_groups=range(6), query_groups={"val": range(2)})
    optimizer, zeros = AT_REST[rule], {"weight": torch.zeros(1, 3).double()}
    tiny = {"weight": torch.full((1, 3), 1e-40).double()}  # so that eps is the metric
    start = Checkpoint(4, zeros, optimizer, zeros, tiny if optimizer.name == "adam" else {}).followed_by(coming)
    run = Trajectory.from_checkpoints([start])
    exact = window_influence(problem.task, run, window=9)["value"]
    got = response_influence(problem.task, run, LocalPosterior(window=9), at=at)["value"]
    np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-13)
    damped = damped_influence(problem.task, run, LocalPosterior(window=9), curvature="exact")["value"]
    assert np.abs(damped - exact).max() > 0.01 * np.abs(exact).max()  # there is something to be told apart


LARGE = 1e9  # of eps, so that Adam's metric is held
MOVING = {
    "sgd": Optimizer("sgd", 1.0, batch_size=0),
    "momentum, L2": Optimizer("sgd", 1.0, momentum=0.7, weight_decay=0.3, batch_size=0),
    "Adam, L2": Optimizer("adam", LARGE, eps=LARGE, weight_decay=0.3, batch_size=0),
    "AdamW": Optimizer("adam", LARGE, eps=LARGE, weight_decay=0.3 / LARGE, decoupled=True, batch_size=0),
    "AdamW in groups": Optimizer(
        "adam", LARGE, eps=LARGE, decoupled=True, batch_size=0,
        groups=(ParameterGroup(("0.weight", "0.bias"), LARGE), ParameterGroup(("2.weight",), LARGE / 3, 0.5 / LARGE)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", MOVING)
def test_the_path_is_right_to_second_order_in_its_length_and_the_checkpoint_to_first(rule):
    """Both against the derivative of the replay: the wrong place, memory or decay is wrong to first order."""
    problem = Problem(hidden=4, **BY_SAMPLE)
    momentum = {name: 0.3 * p.roll(1, 0) for name, p in problem.params.items()}
    second = {name: torch.zeros_like(p) for name, p in problem.params.items()} if MOVING[rule].name == "adam" else {}

    def errors(rate):
        groups = tuple(replace(g, learning_rate=rate * g.learning_rate) for g in MOVING[rule].groups)
        optimizer = replace(MOVING[rule], learning_rate=rate * MOVING[rule].learning_rate, groups=groups)
        start = Checkpoint(3, problem.params, optimizer, momentum, second)
        run = Trajectory.from_checkpoints([start])
        exact = window_influence(problem.task, run, window=6)["value"]
        got = [response_influence(problem.task, run, LocalPosterior(window=6), at=at)["value"] for at in PLACES]
        return np.array([np.abs(value - exact).max() / np.abs(exact).max() for value in got])

    orders = np.log2(errors(0.02) / errors(0.01))
    np.testing.assert_allclose(orders, [2, 1], atol=0.15)


@pytest.mark.parametrize("loss", LOSSES)
def test_samples_are_rows_of_their_groups_and_queries_do_not_disturb_one_another(loss):
    single, grouped = Problem(loss, **BY_SAMPLE), Problem(loss, query_groups={"val": [0, 1, 1, 1]})
    alone, together = (
        response_influence(p.task, p.trajectory, LocalPosterior(window=8))["value"] for p in (single, grouped)
    )
    np.testing.assert_allclose(alone[..., 0], together[..., 0], rtol=1e-9)
    np.testing.assert_allclose(alone[..., 1:].mean("query"), together[..., 1], rtol=1e-9, atol=1e-15)


def test_parameters_that_do_not_move_have_no_part():
    problem = Problem(**BY_SAMPLE)
    posterior = LocalPosterior(window=5, parameters=("2.*",))
    got = response_influence(problem.task, problem.trajectory, posterior, at="checkpoint")["value"][0]
    last = slice(16, None)  # of 3 x 4 + 4 in the first layer
    dense = problem.dense()
    values, vectors = np.linalg.eigh(dense.hessian[last, last])
    response = window_response(values, 5, problem.checkpoint.optimizer)
    expected = -(dense.train[:, last] @ vectors * response) @ (dense.query[:, last] @ vectors).T / 11
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-14)


def test_rows_of_an_embedding_that_no_sample_reads_stay_where_they_are():
    """Adam's metric is 0 there: no division by it may end in what is not a number."""
    tokens, labels = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    task = Task(model, LOSSES["cross_entropy"], train=(tokens, labels), queries={"q": (tokens + 3, labels)})
    run = Trajectory.from_checkpoints([Checkpoint(0, task.state(), Optimizer("adam", 0.01, batch_size=0))])
    assert np.isfinite(response_influence(task, run, LocalPosterior(window=4))["value"]).all()
