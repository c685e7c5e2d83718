"""A run whose learning rate changes: retraining and predictions follow the rates that the run really had."""

import numpy as np
import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.directory import write_checkpoint
from stagewise.checkpoints.recorder import Recorder
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.damped import damped_influence
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.leave_out import leave_out
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.scores import predicted_effect
from stagewise.retraining.unrolling import unrolled_influence
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

N, STEPS = 12, 40
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
}


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def data():
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(N) % 3


def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def trained(kind, weights=None, record=(), folder=None):
    """A plain loop of somebody's own: cosine schedule, full batches; ``weights(step)`` of the samples."""
    (x, y), net = data(), model()
    optimizer = OPTIMIZERS[kind](net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    recorder = Recorder(folder, net, optimizer, record, batch_size=0) if folder else None
    path = []
    for step in range(STEPS):
        if recorder:
            recorder(step)
        path.append([losses(net, (x, y))[y == k].mean().item() for k in range(3)])
        beta = torch.ones(N).double() if weights is None else weights(step)
        optimizer.zero_grad()
        (beta * losses(net, (x, y))).mean().backward()
        optimizer.step()
        schedule.step()
    return np.array(path)


@pytest.fixture(params=OPTIMIZERS)
def recorded(request, tmp_path):
    steps = (5, 12, 20, 30, 39)
    path = trained(request.param, record=steps, folder=tmp_path)
    x, y = data()
    task = Task(model(), losses, train=(x, y), queries={"q": (x, y)}, train_groups=y, query_groups={"q": y})
    return request.param, task, Trajectory.from_directory(tmp_path), path


@pytest.mark.parametrize(("start", "window"), [(5, 7), (5, 20), (20, 15)])
def test_windows_are_retrained_with_the_rates_that_the_run_had_in_them(recorded, start, window):
    kind, task, run, path = recorded
    got = window_ablation(task, run, window=window, steps=[start], weight=0.5)["effect"][0]
    y = data()[1]
    for k in range(3):

        def weights(step, k=k):
            inside = start <= step < start + window
            return torch.where(y == k, 0.5 if inside else 1.0, 1.0).double()

        changed = trained(kind, weights)[start + window]
        np.testing.assert_allclose(got[k], changed - path[start + window], rtol=1e-6, atol=1e-12)


def test_whole_runs_and_exact_influence_follow_them_too(recorded):
    kind, task, run, path = recorded
    y = data()[1]
    got = leave_out(task, run.load(5), BatchOrder(N), [39])["effect"][0]

    def from_5_on(weight):
        return trained(kind, lambda step: 1 + (weight - 1) * ((y == 1) & (step >= 5)).double())[39]

    np.testing.assert_allclose(got[1], from_5_on(0.0) - path[39], rtol=1e-6, atol=1e-12)
    exact = unrolled_influence(task, run.load(5), BatchOrder(N), [39])["value"][0]
    slope = (from_5_on(1 + 1e-5) - from_5_on(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(exact[1], slope / 4, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("kind", ["SGD", "momentum"])
def test_a_windows_reach_is_how_far_a_constant_gradient_moves_the_weights(kind, tmp_path):
    """With a loss that is linear in the weights."""
    net = nn.Linear(1, 1, bias=False).double()
    optimizer = OPTIMIZERS[kind](net.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    recorder, at = Recorder(tmp_path, net, optimizer, (0, 4, 9), batch_size=0), {}
    for step in range(10):
        recorder(step)
        at[step] = net.weight.item()
        optimizer.zero_grad()
        net(torch.ones(1, 1).double()).sum().backward()
        optimizer.step()
        schedule.step()
    x = torch.ones(2, 1).double()
    task = Task(net, lambda model, batch: model(batch[0])[:, 0], train=(x,), queries={"q": (x,)})
    density = LocalPosterior(window=9, n_beta=1.0).at(task, Trajectory.from_directory(tmp_path).load(0))
    assert 1 / density.gamma == pytest.approx(at[0] - at[9], rel=1e-9)


def test_adams_reach_is_that_of_the_mean_of_its_memory():
    params = {"weight": torch.ones(1, 1).double()}
    adam = Optimizer("adam", 0.5, batch_size=0)
    moments = {"first_moment": params, "second_moment": params}
    start = Checkpoint(1000, params, adam, **moments).followed_by([0.5, 0.25])
    net = nn.Linear(1, 1, bias=False).double()
    x = torch.ones(2, 1).double()
    task = Task(net, lambda model, batch: model(batch[0])[:, 0], train=(x,), queries={"q": (x,)})
    gamma = LocalPosterior(window=3, n_beta=1.0).at(task, start).gamma
    assert 1 / gamma == pytest.approx(0.5 * 0.1 + 0.25 * 0.19 + 0.25 * 0.271)  # the last known rate is held


@pytest.mark.parametrize("recorded", ["SGD", "momentum"], indirect=True)
def test_predictions_have_the_size_of_what_the_falling_rate_does(recorded):
    _, task, run, _ = recorded
    measured = window_ablation(task, run, window=10, steps=[30], weight=0.99)["effect"].values.ravel()
    posterior = LocalPosterior(window=10)
    known = run.load(30)
    held = Trajectory.from_checkpoints([known.followed_by(())])
    slopes = []
    for trajectory in (run, held):
        influence = damped_influence(task, trajectory, posterior, curvature="exact", steps=[30])
        predicted = predicted_effect(influence, 0.99)["effect"].values.ravel()
        slopes.append((predicted * measured).sum() / (predicted**2).sum())
    assert slopes[0] == pytest.approx(1, abs=0.3)
    assert slopes[1] < 0.6 * slopes[0]  # a held rate goes on too far


def test_a_trajectory_knows_coming_rates_as_far_as_they_were_recorded(tmp_path):
    params, rule = {"w": torch.ones(1)}, Optimizer("sgd", 0.4)

    def checkpoint(step, rates, rate=0.4):
        return Checkpoint(step, params, Optimizer("sgd", rate), learning_rates=rates)

    falling = [checkpoint(0, ()), checkpoint(2, (0.4, 0.3)), checkpoint(3, (0.2,), 0.2), checkpoint(6, (0.1,))]
    for point in falling:
        write_checkpoint(tmp_path, point)
    for run in (Trajectory.from_checkpoints(falling), Trajectory.from_directory(tmp_path)):
        assert run.load(0).coming_rates == (0.4, 0.3, 0.2)  # of step 3 to 6 one of three is known: no more
        assert run.load(2).coming_rates == (0.2,)
        assert run.load(3).coming_rates == run.load(6).coming_rates == ()
        assert run.load(0).digest == falling[0].digest
        # A window within which the rate stays does not depend on what comes after it.
        assert run.load(0).changing_rates(1) == ()
        assert run.load(0).changing_rates(2) == (0.4, 0.3)
    steady = Trajectory.from_checkpoints(
        [Checkpoint(0, params, rule), Checkpoint(2, params, rule, learning_rates=(0.4, 0.4))]
    )
    assert steady.load(0).coming_rates == ()  # the rate is held
