import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.sampling import LocalPosterior
from stagewise.sampling.posterior import (
    LONGEST_WINDOW,
    MAX_NEGATIVE_CURVATURE,
    largest_window,
    size_range,
    window_reach,
    window_response,
)
from stagewise.task import Task

SGD = Optimizer("sgd", 0.05)
MOMENTUM = Optimizer("sgd", 0.05, momentum=0.9)
ADAM = Optimizer("adam", 0.01, betas=(0.9, 0.9999), eps=1e-4)
V = (0.25, 4.0, 1e-6)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
        self.second = nn.Parameter(torch.tensor([[0.5]], dtype=torch.float64))

    def forward(self, x):
        return x @ self.first + self.second[0, 0]


def task(scale=1.0):
    x = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    return Task(Pair(), lambda model, b: scale * model(b[0]) ** 2, train=(x,), queries={"val": (x[:2],)})


def checkpoint(optimizer=None, step=1000, **more):
    moments = {"first": torch.tensor(V, dtype=torch.float64), "second": torch.ones(1, 1, dtype=torch.float64)}
    fields = {"second_moment": moments if optimizer and optimizer.name == "adam" else {}} | more
    return Checkpoint(step, task().state(), optimizer, **fields)


def response(optimizer, window, push):
    """How far a torch optimiser moves when a constant is added to its gradient, per unit of that constant."""

    def run(extra):
        w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        if optimizer.name == "sgd":
            trainer = torch.optim.SGD([w], optimizer.learning_rate, optimizer.momentum)
        else:
            trainer = torch.optim.Adam([w], optimizer.learning_rate, optimizer.betas, optimizer.eps)
            bias = 1 - optimizer.betas[1] ** 1000
            trainer.state[w] = {
                "step": torch.tensor(1000.0),
                "exp_avg": torch.zeros_like(w),
                "exp_avg_sq": torch.tensor(V, dtype=torch.float64),
            }
        for step in range(window):
            # gradients whose squares keep Adam's second moment where it is, and whose mean is 0
            size = torch.tensor(V, dtype=torch.float64).div(bias).sqrt() if optimizer.name == "adam" else 1.0
            w.grad = (-1) ** step * size + extra * torch.ones_like(w)
            trainer.step()
        return w.detach()

    return (run(0.0) - run(push)) / push


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
def test_localisation_of_a_window_is_the_response_of_the_optimiser_to_a_constant_push(optimizer, window):
    # gradients of the task too small to change what Adam remembers
    density = LocalPosterior(window=window).at(task(1e-8), checkpoint(optimizer))
    reach = density.n_beta / density.gamma * density.scale[:3] ** 2
    torch.testing.assert_close(reach, response(optimizer, window, 1e-7), rtol=2e-3, atol=0)


def test_adam_metric_is_the_step_adam_would_take():
    density = LocalPosterior(gamma=1.0, metric="adam").at(task(), checkpoint(ADAM, step=7))
    corrected = torch.tensor([*V, 1.0], dtype=torch.float64) / (1 - 0.9999**7)
    expected = 1 / (corrected.sqrt() + 1e-4)
    torch.testing.assert_close(density.scale**2, expected, rtol=1e-12, atol=0)


def test_whitened_displacements_move_the_weights_by_the_root_of_the_metric():
    local = LocalPosterior(gamma=1.0, metric="adam").at(task(), checkpoint(ADAM))
    u = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    w = local.anchor + local.scale * u
    x = torch.ones(1, 3, dtype=torch.float64)
    torch.testing.assert_close(local.losses(u, (x,)).values, (x @ w[:3] + w[3]) ** 2, rtol=1e-12, atol=0)


def test_defaults_follow_the_run():
    adam, sgd = (checkpoint(rule) for rule in (ADAM, SGD))
    assert LocalPosterior(window=5).at(task(), adam).metric == "adam"
    assert LocalPosterior(window=5).at(task(), sgd).metric == "euclidean"
    assert LocalPosterior(gamma=5.0).at(task(), adam).metric == "euclidean"
    assert LocalPosterior(gamma=5.0).at(task(), checkpoint()).gamma == 5.0
    local = LocalPosterior(window=5).at(task(), sgd)
    assert local.n_beta == 40.0
    assert local.kappa == 10.0
    assert local.damping == pytest.approx(1 / (0.05 * 5))


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("curvature", [-0.01, -0.3, -7.0])
def test_largest_window_is_the_last_one_that_is_localised(optimizer, curvature):
    window = largest_window(curvature, optimizer)
    damping = [1 / window_reach(w, optimizer) for w in (window, window + 1)]
    assert MAX_NEGATIVE_CURVATURE * damping[0] > -curvature >= MAX_NEGATIVE_CURVATURE * damping[1]


@pytest.mark.parametrize("optimizer", [SGD, Optimizer("sgd", 0.1, momentum=0.9), Optimizer("adam", 0.1)])
@pytest.mark.parametrize("curvature", [-20.0, -1.0, -0.2, -0.05])
def test_windows_of_a_changing_rate_are_reached_by_the_sum_of_its_updates(optimizer, curvature):
    coming = [0.01, 0.02, 0.05, 0.1, 0.1, 0.03]

    def response(window):
        rates, moved, memory = [*coming, *[0.03] * window][:window], 0.0, 0.0
        for rate in rates:
            memory = 0.9 * memory + 0.1 if optimizer.name == "adam" else optimizer.momentum * memory + 1
            moved += rate * memory
        return moved

    for window in (1, 3, 6, 20):
        assert window_reach(window, optimizer, coming) == pytest.approx(response(window))
    largest = largest_window(curvature, optimizer, coming)
    most = MAX_NEGATIVE_CURVATURE
    assert (most / response(largest) > -curvature) if largest else curvature < -most / response(1)
    assert most / response(largest + 1) <= -curvature


def test_a_rate_that_stays_as_it_is_is_a_held_one():
    assert window_reach(30, SGD, [SGD.learning_rate] * 10) == window_reach(30, SGD)


def test_largest_window_at_its_ends():
    assert largest_window(0.5, SGD) == LONGEST_WINDOW
    assert largest_window(-1e9, SGD) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either window= or gamma="),
        ({"window": 3, "gamma": 1.0}, "either window= or gamma="),
        ({"window": 0}, "window must be positive, got 0"),
        ({"gamma": -1.0}, "gamma must be positive"),
        ({"gamma": math.nan}, "gamma must be positive"),
        ({"gamma": 1.0, "n_beta": 0.0}, "n_beta must be positive"),
        ({"gamma": 1.0, "metric": "Adam"}, "metric must be 'euclidean' or 'adam', got 'Adam'"),
    ],
)
def test_settings_that_define_no_posterior_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LocalPosterior(**settings)


@pytest.mark.parametrize(
    ("settings", "at", "message"),
    [
        ({"window": 3}, checkpoint(), "no record of its optimiser"),
        ({"window": 3}, checkpoint(ADAM, second_moment={}), "no second moments of Adam"),
        ({"gamma": 1.0, "metric": "adam"}, checkpoint(SGD), "use metric='euclidean'"),
        ({"window": 3}, checkpoint(Optimizer("sgd", 0.0)), "learning rate at step 1000 is 0, as in front of a warm-up"),
        ({"gamma": 1.0, "parameters": ("third",)}, checkpoint(), "no trainable parameter matches 'third'"),
        ({"gamma": 1.0}, replace(checkpoint(), params={}), "lacks parameter"),
    ],
)
def test_checkpoints_that_lack_what_is_needed_are_refused_with_the_remedy(settings, at, message):
    with pytest.raises(ValueError, match=message):
        LocalPosterior(**settings).at(task(), at)


def test_moments_of_parameters_that_do_not_move_are_not_needed():
    partial = checkpoint(ADAM, second_moment={"first": torch.ones(3, dtype=torch.float64)})
    local = LocalPosterior(window=3, parameters=("first",)).at(task(), partial)
    assert local.vector.names == ("first",)
    assert local.anchor.tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("curvature", [-0.4, 0.0, 0.3, 5.0])
def test_response_of_a_window_is_what_the_optimiser_does_with_a_constant_gradient(optimizer, curvature):
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    b = optimizer.momentum if optimizer.name == "sgd" else optimizer.betas[0]
    rates = [0.02, 0.05, 0.01]
    # plain SGD with momentum, dampened as Adam's first moment is; Adam's metric is 1 in whitened coordinates
    rule = torch.optim.SGD([w], 1.0, momentum=b, dampening=b if optimizer.name == "adam" else 0.0)
    if b and optimizer.name == "adam":
        rule.state[w]["momentum_buffer"] = torch.zeros_like(w)
    for step in range(12):
        rule.param_groups[0]["lr"] = rates[min(step, 2)]
        w.grad = curvature * w.detach() - 1
        rule.step()
    found = window_response(np.array([curvature]), 12, optimizer, rates)
    assert found[0] == pytest.approx(w.item(), rel=1e-9)
    assert window_response(np.zeros(1), 12, optimizer, rates)[0] == pytest.approx(window_reach(12, optimizer, rates))


def test_sizes_are_off_by_as_much_as_the_exact_response_of_sgd_says():
    window, rate = 40, SGD.learning_rate
    local = LocalPosterior(window=window).at(task(), checkpoint(SGD))
    most = MAX_NEGATIVE_CURVATURE * local.damping
    low, high = size_range(local.damping, -most, 6.0, window, SGD)
    s = np.linspace(-most, 6.0, 20_001)
    s = s[s != 0]
    exact = (1 - (1 - rate * s) ** window) / s * (s + local.damping)
    assert low == pytest.approx(exact.min(), rel=1e-3)
    assert high == pytest.approx(exact.max(), rel=1e-3)
    assert low == pytest.approx(1 / 1.82, abs=0.01)  # what MAX_NEGATIVE_CURVATURE allows


def test_momentum_overshoots_by_more_than_plain_sgd_ever_does():
    ranges = []
    for optimizer in (SGD, MOMENTUM):
        local = LocalPosterior(window=20).at(task(), checkpoint(optimizer))
        ranges.append(size_range(local.damping, 0.0, 4 * local.damping, 20, optimizer))
    assert ranges[0][1] < 1.35 < ranges[1][1]
