"""Influence is by definition a derivative: that of a query's expected loss to the weight of a training sample."""

import numpy as np
import pytest
import torch
from regression import Regression
from synthetic_traces import Traces, tree

from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task


def derivative(problem, kappa, gamma, step=1e-4):
    """d E[l_j] / d beta_i of the exact posterior, ``(train, query)``."""
    ones, slopes = np.ones(len(problem.x)), []
    for direction in step * np.eye(len(problem.x)):
        ends = [problem.expected_query_losses(kappa, gamma, ones + sign * direction) for sign in (1, -1)]
        slopes.append((ends[0] - ends[1]) / (2 * step))
    return np.array(slopes)


@pytest.mark.parametrize(("kappa", "gamma"), [(3.0, 5.0), (0.5, 0.1), (40.0, 100.0)])
def test_bif_is_the_derivative_of_the_expected_loss_of_the_exact_posterior(kappa, gamma):
    problem = Regression.random()
    mean, covariance = problem.posterior(kappa, gamma, np.ones(8))
    draws = np.random.default_rng(1).multivariate_normal(mean, covariance, size=(64, 2000))
    traces = Traces({0: tree(problem.losses(draws), {"val": problem.losses(draws, query=True)}, kappa=kappa)})
    got = bif(traces, grouped=False)
    truth = derivative(problem, kappa, gamma)
    error = np.abs(got["value"][0].values - truth) / got["stderr"][0].values
    assert error.max() < 4
    assert np.sqrt((error**2).mean()) < 1.5
    assert got["stderr"].max() < 0.02 * np.abs(truth).max()  # tight enough to notice a wrong factor


def test_training_on_the_query_itself_helps_and_on_its_opposite_harms():
    x, y = np.array([[1.0], [1.0], [1.0]]), np.array([2.0, -2.0, 2.0])
    problem = Regression(x, y, x[:1], y[:1], w=np.zeros(1))
    draws = np.random.default_rng(0).normal(size=(16, 200, 1)) * 0.1
    traces = Traces({0: tree(problem.losses(draws), {"val": problem.losses(draws, query=True)})})
    value = bif(traces)["value"].values.ravel()
    assert value[0] < 0 < value[1]
    assert value[2] < 0


def test_sampling_a_window_agrees_with_solving_it():
    problem = Regression.random(n=6, d=2, train_groups=list("aabbcc"), query_groups={"val": list("xyx")})
    posterior = LocalPosterior(window=10)
    trajectory = problem.trajectory()
    cell = sample_block(problem.task, trajectory.load(10), posterior, Chains(chains=64, draws=64))
    traces = Traces({10: cell}, {"train": problem.task.train_groups, "queries": problem.task.query_groups})
    sampled = bif(traces, part="odd")
    solved = damped_influence(problem.task, trajectory, posterior, curvature="exact")
    assert sampled["value"].coords["train"].equals(solved["value"].coords["train"])
    assert sampled["value"].coords["query"].equals(solved["value"].coords["query"])
    error = (sampled["value"] - solved["value"]) / sampled["stderr"]
    assert np.abs(error).max() < 4
    assert sampled["stderr"].max() < 0.1 * np.abs(solved["value"]).max()
    assert not cell["queries/val"].attrs["is_training_set"]


def test_a_query_set_of_the_training_samples_is_marked_whatever_object_holds_it():
    problem = Regression.random(n=6)
    x, y = (torch.from_numpy(a) for a in (problem.x, problem.y))
    copies = {"same": (x.clone(), y.clone()), "other": (x, y + 1), "shorter": (x[:5], y[:5])}
    task = Task(problem.task.model, problem.task.loss, train=(x, y), queries=copies)
    sampling = Chains(chains=2, draws=2, burn_in=1, thinning=1)
    cell = sample_block(task, problem.trajectory().load(10), LocalPosterior(window=20), sampling)
    marks = {name: bool(cell[f"queries/{name}"].attrs["is_training_set"]) for name in copies}
    assert marks == {"same": True, "other": False, "shorter": False}
