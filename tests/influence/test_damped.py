import numpy as np
import pytest
import torch
from regression import Regression
from small_networks import LOSSES, Problem

from stagewise.influence import damped
from stagewise.influence.damped import conjugate_gradients, damped_influence
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.scores import predicted_effect
from stagewise.sampling.posterior import LocalPosterior

BY_SAMPLE = {"query_groups": {"val": range(4)}}
TIGHT = {"tolerance": 1e-12, "max_iterations": 400}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("curvature", ["exact", "hessian", "gauss_newton"])
def test_influence_is_that_of_dense_linear_algebra(loss, optimizer, curvature):
    problem = Problem(loss, optimizer=optimizer, rate=0.05, **BY_SAMPLE)
    got = damped_influence(problem.task, problem.trajectory, LocalPosterior(window=8), curvature=curvature, **TIGHT)
    dense = problem.dense()
    matrix = dense.gauss_newton if curvature == "gauss_newton" else dense.hessian
    reach = 0.05 * (8 if optimizer == "sgd" else 8 - 9 * (1 - 0.9**8))
    np.testing.assert_allclose(got["value"][0], dense.influence(matrix, 1 / reach), rtol=1e-9, atol=1e-13)
    assert (got["stderr"] > 0).all() == (curvature != "exact")  # the solver stops at a tolerance
    assert got["stderr"].max() <= 1e-12 * np.abs(got["value"]).max()
    assert got.attrs["estimator"] == f"damped influence ({curvature})"


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_hessian_and_gauss_newton_agree_on_linear_models_and_only_there(loss):
    for hidden, agree in ((0, True), (4, False)):
        problem = Problem(loss, hidden=hidden, **BY_SAMPLE)
        a, b = (
            damped_influence(problem.task, problem.trajectory, LocalPosterior(window=5), curvature=curvature, **TIGHT)
            for curvature in ("hessian", "gauss_newton")
        )
        assert np.allclose(a["value"], b["value"], rtol=1e-9, atol=1e-13) == agree


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_products_do_not_depend_on_the_batches(curvature, monkeypatch):
    problem = Problem("tokens")
    density = LocalPosterior(window=20).at(problem.task, problem.checkpoint)
    product = {"hessian": damped.hessian_product, "gauss_newton": damped.gauss_newton_product}[curvature]
    vectors = torch.randn(3, density.vector.size, dtype=torch.float64)
    whole = product(density, density.origin)(vectors)
    monkeypatch.setattr(problem.task, "forward_batch", 4)
    torch.testing.assert_close(product(density, density.origin)(vectors), whole, rtol=1e-12, atol=1e-12)


def test_exact_raises_eigenvalues_that_no_posterior_allows_and_leaves_the_others():
    problem = Problem(rate=10.0, **BY_SAMPLE)
    posterior = LocalPosterior(window=100)
    dense, damping = problem.dense(), 1e-3
    values, vectors = np.linalg.eigh(dense.hessian)
    assert values[0] < -damping
    raised = (vectors * np.maximum(values, -damping / 2)) @ vectors.T
    got = damped_influence(problem.task, problem.trajectory, posterior, curvature="exact")
    np.testing.assert_allclose(got["value"][0], dense.influence(raised, damping), rtol=1e-8, atol=1e-12)


def test_negative_curvature_is_an_error_of_the_hessian_and_no_concern_of_gauss_newton():
    problem = Problem(rate=10.0)
    posterior = LocalPosterior(window=100)
    with pytest.raises(ValueError, match="not localised"):
        damped_influence(problem.task, problem.trajectory, posterior, curvature="hessian")
    assert np.isfinite(damped_influence(problem.task, problem.trajectory, posterior)["value"]).all()


def test_exact_refuses_more_parameters_than_fit(monkeypatch):
    monkeypatch.setattr(damped, "_LARGEST_EXACT", 30)
    problem = Problem()
    with pytest.raises(ValueError, match="dense 31 x 31 matrix, at most 30"):
        damped_influence(problem.task, problem.trajectory, LocalPosterior(window=5), curvature="exact")


@pytest.fixture
def system():
    random = torch.Generator().manual_seed(0)
    half = torch.randn(20, 20, generator=random, dtype=torch.float64)
    return half @ half.T / 20 + 0.1 * torch.eye(20), torch.randn(3, 20, generator=random, dtype=torch.float64)


class Counted:
    """A product that counts how often it is asked."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, vectors):
        self.calls += 1
        return vectors @ self.matrix.to(vectors)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-10])
def test_conjugate_gradients_reach_the_residual_asked_for_and_do_no_more(system, tolerance):
    matrix, targets = system
    product = Counted(matrix)
    x = conjugate_gradients(product, targets, tolerance, 100)
    residual = (targets - x @ matrix).norm(dim=1) / targets.norm(dim=1)
    assert residual.max() <= tolerance * (1 + 1e-6)
    assert residual.max() > 1e-4 * tolerance
    needed = product.calls
    conjugate_gradients(product, targets, tolerance, needed)
    with pytest.raises(ValueError, match="raise max_iterations"):
        conjugate_gradients(product, targets, tolerance, needed - 1)


def test_no_convergence_is_an_error_that_says_how_far_it_came(system):
    matrix, targets = system
    with pytest.raises(ValueError, match=r"residual of [\d.e-]+, not 1e-08, in 3 iterations; raise max_iterations"):
        conjugate_gradients(Counted(matrix), targets, 1e-8, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_query_without_gradient_gets_no_influence_and_disturbs_no_other(system, dtype):
    matrix, targets = system
    targets = targets.to(dtype)
    targets[1] = 0
    x = conjugate_gradients(Counted(matrix), targets, 1e-4, 100)
    assert not x[1].any()
    expected = torch.linalg.solve(matrix, targets.double().T).T
    torch.testing.assert_close(x.double(), expected, rtol=1e-2, atol=1e-2)


def test_products_that_are_not_finite_never_count_as_solved(system):
    matrix, targets = system
    with pytest.raises(ValueError, match="residual of nan"):
        conjugate_gradients(Counted(torch.nan * matrix), targets, 1e-4, 10)


def test_a_checkpoints_value_does_not_depend_on_which_others_were_asked_for():
    problem = Problem(**BY_SAMPLE)
    moved = {name: 1.5 * tensor for name, tensor in problem.params.items()}
    later = type(problem.checkpoint)(9, moved, problem.checkpoint.optimizer)
    trajectory = type(problem.trajectory).from_checkpoints([problem.checkpoint, later])
    both = damped_influence(problem.task, trajectory, LocalPosterior(window=20))
    alone = damped_influence(problem.task, trajectory, LocalPosterior(window=20), steps=[9])
    assert both["step"].values.tolist() == [5, 9]
    np.testing.assert_array_equal(both["value"][1], alone["value"][0])


@pytest.mark.parametrize("window", [1, 5, 40])
def test_the_damped_form_predicts_a_retrained_window(window):
    """With one curvature s in all directions both are known exactly: rate * W of damping for 1 - (1 - rate s)^W."""
    x = np.sqrt(2.0) * np.concatenate([np.eye(2), -np.eye(2)])
    y, xq, yq = np.array([1.0, -0.4, 0.3, 0.8]), np.array([[1.0, 2.0], [0.5, -1.0]]), np.array([0.3, 0.1])
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    problem = Regression(x, y, xq, yq, w, train_groups=range(4), query_groups={"val": range(2)})
    np.testing.assert_allclose(problem.hessian, np.eye(2), atol=1e-12)

    rate, weight = 0.05, 1 - 1e-6
    trajectory = problem.trajectory(rate=rate)
    influence = damped_influence(problem.task, trajectory, LocalPosterior(window=window), curvature="exact")
    predicted = predicted_effect(influence, weight)["effect"]
    measured = window_ablation(problem.task, trajectory, window=window, weight=weight)["effect"]
    factor = (1 - (1 - rate) ** window) * (1 + 1 / (rate * window))
    assert 1 <= factor < 1.31
    np.testing.assert_allclose(measured, factor * predicted, rtol=1e-4)
    assert measured.indexes["train"].equals(predicted.indexes["train"])
