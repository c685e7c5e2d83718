from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stagewise import evaluate
from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.derivatives import dense, hessian_product
from stagewise.evaluate import spread_rows
from stagewise.sampling import Chains, LocalPosterior, curvature, sample_block
from stagewise.sampling.curvature import extreme_curvature
from stagewise.sampling.gradient import BatchLoss
from stagewise.task import Task


def network(hidden, seed=0, n=40):
    """A random network away from any minimum, and its density in Adam's metric: an indefinite Hessian."""
    random = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    data = (
        torch.randn(n, 3, generator=random, dtype=torch.float64),
        torch.randint(2, (n,), generator=random),
    )
    task = Task(
        model,
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"),
        train=data,
        queries={"val": tuple(part[:2] for part in data)},
    )
    moments = {name: torch.rand(p.shape, generator=random).double() for name, p in model.named_parameters()}
    return task, Checkpoint(100, task.state(), Optimizer("adam", 0.01), second_moment=moments)


def dense_spectrum(density):
    batch = density.task.train.batch(slice(None))
    hessian = torch.autograd.functional.hessian(
        lambda u: BatchLoss(density)(u, batch), torch.zeros_like(density.anchor)
    )
    return hessian, torch.linalg.eigvalsh(hessian)


@pytest.fixture(params=[True, False], ids=["stored", "recurring"])
def stored(request, monkeypatch):
    """Whether Lanczos keeps its vectors."""
    if not request.param:
        monkeypatch.setattr(curvature, "_STORED_LIMIT", 0)


@pytest.mark.parametrize("hidden", [2, 5, 12, 60])
@pytest.mark.parametrize("gamma", [0.1, 100.0])
@pytest.mark.usefixtures("stored")
def test_extremes_agree_with_the_dense_spectrum(hidden, gamma):
    density = LocalPosterior(gamma=gamma, n_beta=10.0, metric="adam").at(*network(hidden))
    assert (density.vector.size > 32) == (hidden > 5)
    hessian, spectrum = dense_spectrum(density)
    found = extreme_curvature(density)
    precise = 0.01 * (density.damping + abs(spectrum[0].item()))
    assert spectrum[0] < -0.01
    assert found.smallest == pytest.approx(spectrum[0].item(), abs=precise)
    assert found.largest == pytest.approx(spectrum[-1].item(), rel=0.01)
    assert found.softest.norm() == pytest.approx(1)
    assert (found.softest @ hessian @ found.softest).item() == pytest.approx(spectrum[0].item(), abs=precise)


def test_hessian_product_is_the_hessian_in_whitened_coordinates():
    density = LocalPosterior(gamma=1.0, metric="adam").at(*network(4))
    hessian, _ = dense_spectrum(density)
    vectors = torch.randn(3, density.vector.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = hessian_product(density, density.origin)
    torch.testing.assert_close(product(vectors), vectors @ hessian, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dense(product, density.origin, rows=7), hessian, rtol=1e-10, atol=1e-12)


def linear_task(rank, size=300):
    """Least squares with far more weights than data: most directions are exactly flat."""
    x = torch.randn(max(rank, 1), size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * (rank > 0)
    model = nn.Linear(size, 1, bias=False).double()
    task = Task(model, lambda m, b: 0.5 * m(b[0])[:, 0] ** 2, train=(x,), queries={"val": (x,)})
    return task, Checkpoint(0, task.state())


@pytest.mark.parametrize("rank", [0, 1, 5, 50, 200])
@pytest.mark.usefixtures("stored")
def test_flat_directions_are_found_flat(rank):
    task, checkpoint = linear_task(rank)
    density = LocalPosterior(gamma=3.0, n_beta=10.0).at(task, checkpoint)
    found = extreme_curvature(density)
    x = task.train.batch(slice(None))[0]
    assert found.smallest == pytest.approx(0, abs=0.01 * density.damping)
    assert found.largest == pytest.approx(torch.linalg.matrix_norm(x, 2).item() ** 2 / len(x), rel=0.01)


@pytest.mark.parametrize("size", [5, 50])
@pytest.mark.usefixtures("stored")
def test_curvature_that_is_not_finite_is_refused(size):
    model = nn.Linear(size, 1, bias=False).double()
    model.weight.data.zero_()
    x = torch.ones(2, size, dtype=torch.float64)
    task = Task(model, lambda m, b: m(b[0])[:, 0].abs() ** 1.5, train=(x,), queries={"val": (x,)})
    density = LocalPosterior(gamma=1.0).at(task, Checkpoint(0, task.state()))
    with pytest.raises(ValueError, match="not finite"):
        extreme_curvature(density)


def test_sorted_training_sets_are_represented_from_end_to_end():
    rows = spread_rows(600, 1000)
    assert len(rows) == len(set(rows.tolist())) == 600
    assert rows[0] == 0
    assert rows[-1] > 990
    assert rows.diff().max() <= 2
    assert torch.equal(spread_rows(10**6, 1000), torch.arange(1000))


def test_curvature_of_some_samples_is_that_of_their_own_mean_loss():
    task, checkpoint = network(4)
    rows = torch.tensor([3, 17, 18])
    part = Task(task.model, task.loss, train=task.train.batch(rows), queries={"val": task.train.batch(rows)})
    posterior = LocalPosterior(gamma=1.0, n_beta=1.0)
    vectors = torch.randn(2, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    some, whole = (posterior.at(which, replace(checkpoint, optimizer=None)) for which in (task, part))
    got = hessian_product(some, some.origin, rows)(vectors)
    torch.testing.assert_close(got, hessian_product(whole, whole.origin)(vectors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [3, 12])
def test_checkpoint_curved_downwards_beyond_the_localisation_is_not_sampled(hidden):
    task, checkpoint = network(hidden)
    most_negative = -dense_spectrum(LocalPosterior(gamma=1.0).at(task, checkpoint))[1][0].item()
    sampling = Chains(chains=3, draws=2, burn_in=2, thinning=1)
    for factor, status in ((0.97, "not_localised"), (1.03, "ok")):
        tree = sample_block(task, checkpoint, LocalPosterior(gamma=10 * factor * most_negative, n_beta=10.0), sampling)
        assert set(tree["chains"]["status"].values) == {status}
        assert tree.attrs["localised"] == (status == "ok")
        assert ("train" in tree.children) == (status == "ok")
        assert tree.attrs["curvature_min"] == pytest.approx(-most_negative, rel=0.02)


def test_posterior_that_is_not_localised_is_sampled_when_asked_and_says_so():
    task, checkpoint = network(3)
    posterior = LocalPosterior(gamma=0.01, n_beta=1.0, require_localised=False)
    tree = sample_block(task, checkpoint, posterior, Chains(chains=2, draws=2, burn_in=2, thinning=1))
    assert tree.attrs["localised"] is False
    assert np.isfinite(tree["train"]["loss"]).all()


def test_large_models_are_represented_by_fewer_samples(monkeypatch):
    point = LocalPosterior(gamma=1.0).at(*network(4))
    assert len(evaluate.represented(point)) == 40
    monkeypatch.setattr(evaluate, "_PRODUCT_COST", 20 * point.vector.size)
    assert len(evaluate.represented(point)) == 20
    monkeypatch.setattr(evaluate, "_PRODUCT_COST", 1)
    assert len(evaluate.represented(point)) == 8
