import numpy as np
import pytest
import torch
from regression import Regression
from small_networks import LOSSES, Problem

from stagewise.derivatives import directional_derivatives, group_gradients
from stagewise.groups import query_groups
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.sampling.posterior import LocalPosterior

BY_SAMPLE = {"query_groups": {"val": range(4)}}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_windows_gradient_product_is_the_dot_product_of_sample_gradients_in_the_metric(loss, optimizer):
    problem = Problem(loss, optimizer=optimizer, **BY_SAMPLE)
    posterior = LocalPosterior(window=8)
    got = gradient_product(problem.task, problem.trajectory, posterior)
    dense = problem.dense()
    reach = 0.1 * (8 if optimizer == "sgd" else 8 - 9 * (1 - 0.9**8))
    expected = -reach / 11 * dense.train @ (dense.metric[:, None] * dense.query.T)
    np.testing.assert_allclose(got["value"][0], expected, rtol=1e-10, atol=1e-14)
    assert not got["stderr"].any()
    assert got.attrs["metric"] == ("adam" if optimizer == "adam" else "euclidean")


def test_with_gamma_the_product_is_divided_by_it():
    problem = Problem(**BY_SAMPLE)
    got = gradient_product(problem.task, problem.trajectory, LocalPosterior(gamma=7.0, n_beta=22.0))
    dense = problem.dense()
    np.testing.assert_allclose(got["value"][0], -(22 / 11) / 7 * dense.train @ dense.query.T, rtol=1e-10, atol=1e-14)
    assert got.attrs["gamma"] == 7.0


def test_groups_are_means_of_samples_and_carry_their_sizes():
    labels = list("abcabcabcab")
    grouped = Problem(train_groups=labels, query_groups={"val": list("xyyy")})
    posterior = LocalPosterior(window=8)
    got = gradient_product(grouped.task, grouped.trajectory, posterior)["value"][0]
    single = Problem(**BY_SAMPLE)
    value = gradient_product(single.task, single.trajectory, posterior)["value"][0].values
    for name in "abc":
        rows = value[np.array(labels) == name]
        np.testing.assert_allclose(got.sel(train=name), [rows[:, 0].mean(), rows[:, 1:].mean()], rtol=1e-10)
    assert got["train_size"].values.tolist() == [4, 4, 3]
    assert got["query_size"].values.tolist() == [1, 3]


def test_a_step_of_gradient_descent_on_one_sample_changes_the_query_by_this_much():
    problem = Regression.random(n=5, q=3)
    got = gradient_product(problem.task, problem.trajectory(rate=0.1), LocalPosterior(window=1))["value"][0]
    tiny = 1e-6
    for i in range(5):
        pull = problem.x[i] * (problem.x[i] @ problem.w - problem.y[i])
        moved = problem.w - tiny * 0.1 * pull / 5
        change = (problem.losses(moved, query=True) - problem.losses(problem.w, query=True)).mean() / tiny
        np.testing.assert_allclose(got[i, 0], change, rtol=1e-4)


def test_the_same_steps_are_asked_for_as_are_answered():
    problem = Problem()
    with pytest.raises(ValueError, match=r"steps \[6\] have no checkpoint; there are \[5\]"):
        gradient_product(problem.task, problem.trajectory, LocalPosterior(window=8), steps=[5, 6])
    with pytest.raises(ValueError, match="no checkpoint"):
        gradient_product(problem.task, problem.trajectory, LocalPosterior(window=8), steps=[])


def test_unusable_losses_are_refused_before_they_become_influence():
    problem = Problem()
    problem.checkpoint.params["0.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="loss of sample 0 is not finite"):
        gradient_product(problem.task, problem.trajectory, LocalPosterior(window=8))


@pytest.mark.parametrize("loss", ["cross_entropy", "tokens"])
def test_passes_over_the_data_do_not_depend_on_the_batches(loss, monkeypatch):
    problem = Problem(loss)
    density = LocalPosterior(window=8).at(problem.task, problem.checkpoint)
    directions = torch.randn(3, density.vector.size, dtype=torch.float64)
    queries = query_groups(problem.task)

    def passes():
        along = directional_derivatives(density, density.origin, directions, problem.task.train)
        return along, group_gradients(density, density.origin, queries)

    whole = passes()
    monkeypatch.setattr(problem.task, "forward_batch", 3)
    parts = passes()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_gradient_product_is_the_damped_influence_of_a_vanishing_window():
    problem = Problem(**BY_SAMPLE, rate=1e-7)
    posterior = LocalPosterior(window=1)
    product = gradient_product(problem.task, problem.trajectory, posterior)
    for curvature in ("exact", "gauss_newton", "hessian"):
        damped = damped_influence(problem.task, problem.trajectory, posterior, curvature=curvature)
        np.testing.assert_allclose(damped["value"], product["value"], rtol=1e-5)
