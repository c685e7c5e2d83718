"""Every remedy that a verdict prints is followed on a case that prints it: it helps, or says what cannot be done."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.sampling import Chains, LocalPosterior, sample_block
from stagewise.sampling.posterior import DEFAULT_N_BETA_PER_SAMPLE
from stagewise.task import Task
from stagewise.traces.diagnostics import diagnose

SAMPLING = Chains(chains=8, draws=40, batching="stacked")


def network(activation, n=40, hidden=12, seed=0, scale=1.0):
    """A random network away from any minimum, trained by plain SGD: an indefinite Hessian."""
    random = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, hidden), activation, nn.Linear(hidden, 2)).double()
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    data = (torch.randn(n, 3, generator=random, dtype=torch.float64), torch.randint(2, (n,), generator=random))
    task = Task(
        model,
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"),
        train=data,
        queries={"val": tuple(part[:10] for part in data)},
    )
    return task, Checkpoint(100, task.state(), Optimizer("sgd", 0.05, batch_size=0))


def looked_at(problem, posterior, sampling=SAMPLING):
    """Facts, verdict and advice at the checkpoint."""
    tree = sample_block(*problem, posterior, sampling)
    found = diagnose(tree)
    return tree.attrs, found["verdict"].item(), found["advice"].item()


def number(pattern, advice):
    return float(re.search(pattern, advice)[1])


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_a_window_as_short_as_is_advised_is_answered_and_is_the_longest_that_curvature_allows(activation):
    problem = network(activation)
    _, verdict, advice = looked_at(problem, LocalPosterior(window=3000))
    assert verdict == "not localised"
    longest = int(number(r"a window of at most (\d+) training steps", advice))
    facts, verdict, advice = looked_at(problem, LocalPosterior(window=longest))
    # kinks may ask for a shorter one still, each time by half
    while verdict == "not localised" and facts["localised"]:
        longest = int(number(r"a window of at most (\d+) training steps", advice))
        facts, verdict, advice = looked_at(problem, LocalPosterior(window=longest))
    assert (verdict, advice) == ("ok", "")
    if isinstance(activation, nn.Tanh):
        assert looked_at(problem, LocalPosterior(window=longest + 2))[1] == "not localised"


def test_a_checkpoint_that_no_window_can_answer_is_to_be_left_out():
    task, checkpoint = network(nn.Tanh(), scale=2.0)
    steep = replace(checkpoint, optimizer=Optimizer("sgd", 50.0, batch_size=0))
    _, verdict, advice = looked_at((task, steep), LocalPosterior(window=5))
    assert verdict == "not localised"
    assert advice.endswith("not even with a window of one training step; leave this step out")


def test_a_step_that_is_too_long_is_cured_by_the_one_named_and_by_naming_none():
    problem, posterior = network(nn.Tanh()), LocalPosterior(window=10)
    _, verdict, advice = looked_at(problem, posterior, replace(SAMPLING, step_size=10.0))
    assert verdict == "chains failed"
    for step_size in (number(r"leave step_size out, or set it to (\S+)", advice), None):
        assert looked_at(problem, posterior, replace(SAMPLING, step_size=step_size))[1] == "ok"


def test_a_step_that_is_too_short_to_move_is_cured_by_the_one_named():
    problem, posterior = network(nn.Tanh()), LocalPosterior(window=10)
    still = replace(SAMPLING, step_size=1e-30, burn_in=4, thinning=1)
    _, verdict, advice = looked_at(problem, posterior, still)
    assert verdict == "cannot say"
    step_size = number(r"leave step_size out, or set it to (\S+)", advice)
    assert looked_at(problem, posterior, replace(SAMPLING, step_size=step_size))[1] == "ok"


def test_heat_by_a_step_set_by_hand_is_cured_by_the_one_named_and_by_the_whole_training_set():
    problem, posterior = network(nn.Tanh(), n=100), LocalPosterior(window=8)
    step_size = looked_at(problem, posterior)[0]["step_size"]
    hot = replace(SAMPLING, step_size=step_size, batch_size=4)
    facts, verdict, advice = looked_at(problem, posterior, hot)
    assert verdict == "heated", facts["heat"]
    assert f"{facts['heat']:.0%} of the variances" in advice
    shorter = number(r"set it to ([^,]+),", advice)
    assert looked_at(problem, posterior, replace(hot, step_size=shorter))[1] == "ok"
    assert looked_at(problem, posterior, replace(hot, batch_size=None))[1] == "ok"


def test_chains_that_are_too_few_or_too_short_are_told_how_many_and_how_long():
    problem, posterior = network(nn.Tanh()), LocalPosterior(window=10)
    _, verdict, advice = looked_at(problem, posterior, replace(SAMPLING, chains=1))
    assert verdict == "cannot say"
    chains = int(number(r"better (\d+)", advice))
    _, verdict, advice = looked_at(problem, posterior, replace(SAMPLING, draws=4))
    assert verdict == "cannot say"
    draws = int(number(r"better (\d+)", advice))
    assert looked_at(problem, posterior, replace(SAMPLING, chains=chains, draws=draws))[1] == "ok"


def test_chains_that_start_too_early_and_draw_too_often_are_cured_by_the_numbers_named():
    problem, posterior = network(nn.Tanh()), LocalPosterior(window=6)
    sampling = replace(SAMPLING, sampler="sgld", burn_in=1, thinning=1)
    verdict = "not converged"
    rounds = 0
    while verdict == "not converged":
        _, verdict, advice = looked_at(problem, posterior, sampling)
        if verdict == "not converged":
            burn_in, thinning = (
                int(number(rf"{name} \(about .* -> (\d+)\)", advice)) for name in ("burn_in", "thinning")
            )
            sampling, rounds = replace(sampling, burn_in=burn_in, thinning=thinning), rounds + 1
    assert verdict == "ok"
    assert 1 <= rounds < 6


class TwoWells(nn.Module):
    """One weight in a double well that no short chain crosses, and one in a bowl."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self):
        return self.w


def wells(model, batch):
    w = model()
    return 4 * (w[0] ** 2 - 1) ** 2 + w[1] ** 2 + batch[0] * w.sum()


def test_chains_that_stay_apart_however_long_they_run_are_told_that_the_window_is_too_long():
    data = (torch.linspace(-1, 1, 20, dtype=torch.float64),)
    task = Task(TwoWells(), wells, train=data, queries={"val": data})
    checkpoint = Checkpoint(5, task.state(), Optimizer("sgd", 0.01, batch_size=0))
    apart = LocalPosterior(gamma=40.0, n_beta=20.0, require_localised=False)
    sampling = replace(SAMPLING, draws=32, burn_in=200, thinning=20)
    _, verdict, advice = looked_at((task, checkpoint), apart, sampling)
    assert verdict in ("not localised", "not converged")
    assert "gamma" in advice
    gamma, rounds = 40.0, 0
    while verdict != "ok" and rounds < 3:
        gamma, rounds = 4 * gamma, rounds + 1
        _, verdict, _ = looked_at((task, checkpoint), replace(apart, gamma=gamma), sampling)
    assert verdict == "ok"


def bent(model, batch):
    """Losses whose second order is as large as their first until the posterior is narrow."""
    w = model()
    return 0.05 * batch[0] * w.sum() + 2 * (1 + batch[0]) * (w**2).sum()


def bent_task():
    data = (torch.linspace(-0.9, 0.9, 12, dtype=torch.float64),)
    task = Task(TwoWells(), bent, train=data, queries={"val": data})
    return task, Checkpoint(5, task.state(), Optimizer("sgd", 0.01, batch_size=0))


def test_n_beta_set_by_hand_is_raised_as_advised_until_first_order_dominates():
    problem, n_beta, rounds = bent_task(), 12.0, 0
    _, verdict, advice = looked_at(problem, LocalPosterior(window=10, n_beta=n_beta))
    assert verdict == "beyond first order"
    while verdict == "beyond first order":
        n_beta, rounds = number(r"n_beta \(about .* -> (\S+)\)", advice), rounds + 1
        facts, verdict, advice = looked_at(problem, LocalPosterior(window=10, n_beta=n_beta))
    assert verdict == "ok"
    assert rounds <= 3
    assert facts["n_beta"] == n_beta


def test_where_no_n_beta_brings_first_order_a_shorter_window_is_advised_until_none_is_left():
    task, checkpoint = bent_task()
    task = Task(task.model, lambda m, b: bent(m, b) - 0.05 * b[0] * m().sum(), train=task.train, queries=task.queries)
    window, advice = 8, ""
    while "leave this step out" not in advice:
        _, verdict, advice = looked_at((task, checkpoint), LocalPosterior(window=window))
        assert verdict == "beyond first order"
        assert "although n_beta is" in advice
        if window > 1:
            window = int(number(r"window of at most (\d+) training steps", advice))
    assert window == 1


def test_left_to_the_pilot_n_beta_is_large_enough_and_no_larger_than_it_must_be():
    task, checkpoint = bent_task()
    facts, verdict, _ = looked_at((task, checkpoint), LocalPosterior(window=10))
    assert verdict == "ok"
    least = DEFAULT_N_BETA_PER_SAMPLE * len(task.train)
    assert facts["n_beta"] > 8 * least
    assert np.log2(facts["n_beta"] / least) % 1 == 0
    # gamma follows, so that the window is the same, and every block chooses alike
    assert facts["damping"] == pytest.approx(1 / (0.01 * 10))
    other = sample_block(task, checkpoint, LocalPosterior(window=10), SAMPLING, block=3)
    assert other.attrs["n_beta"] == facts["n_beta"]
    plain = looked_at(network(nn.Tanh()), LocalPosterior(window=10))[0]
    assert plain["n_beta"] == DEFAULT_N_BETA_PER_SAMPLE * 40


def test_a_query_that_nothing_holds_is_answered_once_its_parameters_stay():
    random = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"common": nn.Linear(3, 2), "rare": nn.Linear(1, 2, bias=False)}).double()

    def loss(m, batch):
        return nn.functional.cross_entropy(
            m["common"](batch[0][:, 1:]) + m["rare"](batch[0][:, :1]), batch[1], reduction="none"
        )

    # the first feature is 0 in training, and 1 in the queries: nothing says where its weights are
    x, y = torch.randn(40, 4, generator=random, dtype=torch.float64), torch.arange(40) % 2
    x[:, 0] = 0
    asked = x[:4].clone()
    asked[:, 0] = 1
    task = Task(model, loss, train=(x, y), queries={"val": (asked, y[:4])})
    wide = LocalPosterior(gamma=0.01, n_beta=100.0)
    problem, few = (task, Checkpoint(5, task.state())), replace(SAMPLING, chains=4, burn_in=300, thinning=30)
    _, verdict, advice = looked_at(problem, wide, few)
    assert verdict == "unconstrained"
    assert "parameters=" in advice
    assert looked_at(problem, replace(wide, parameters=("common.*",)), few)[1] == "ok"
