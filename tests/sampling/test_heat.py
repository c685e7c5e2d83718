"""Minibatches add to the variances no more than is stated, and intervals hold the truth as often as they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian import Gaussian, walk

from stagewise.influence.covariance import covariance_replicates, mean_and_stderr
from stagewise.sampling import SGLD, Chains, LocalPosterior, Underdamped
from stagewise.sampling.base import Gradient
from stagewise.sampling.gradient import reshuffled
from stagewise.sampling.heat import MAX_HEAT, epoch_correlation, gradient_noise
from stagewise.sampling.tuning import tune

REPETITIONS, CHAINS = 60, 16
ROWS = slice(0, 6)


def tuned(gaussian, posterior, **settings):
    return tune(posterior.at(gaussian.task, gaussian.checkpoint), Chains(chains=CHAINS, **settings))


def shared_minibatches(gaussian, posterior, size):
    """As ``potential_gradient`` with a control variate; the chains of a run share minibatches, runs do not."""
    hessians = torch.from_numpy(gaussian.losses["train"][0])
    random = torch.Generator().manual_seed(1)

    def epochs():
        while True:
            order = torch.rand(REPETITIONS, len(hessians), generator=random).argsort(1)
            yield from (order[:, i : i + size] for i in range(0, len(hessians) - size + 1, size))

    rows = epochs()

    def gradient(u):
        change = u.view(REPETITIONS, CHAINS, -1) @ hessians[next(rows)].mean(1)
        return Gradient(posterior.n_beta * change.view_as(u) + posterior.gamma * u, u)

    return gradient


def size_and_coverage(gaussian, posterior, tuning, sampler):
    """Slope of estimated covariances on the exact ones, and how often the 95 % intervals hold the exact ones."""
    gradient = shared_minibatches(gaussian, posterior, tuning.batch_size)
    u = walk(sampler, gradient, REPETITIONS * CHAINS, 64, burn_in=tuning.burn_in, thinning=tuning.thinning)
    train, val = gaussian.traces("train", u)[..., ROWS], gaussian.traces("val", u)
    runs = zip(np.split(train, REPETITIONS), np.split(val, REPETITIONS), strict=True)
    values, stderrs = map(np.stack, zip(*(mean_and_stderr(covariance_replicates(a, b)) for a, b in runs), strict=True))
    truth = gaussian.loss_covariance(gaussian.law(posterior), "train", "val")[ROWS]
    slope = (values.mean(0) * truth).sum() / (truth**2).sum()
    return slope, (abs(values - truth) < 1.96 * stderrs).mean()


@pytest.mark.parametrize(
    ("size", "gaussian", "posterior"),
    [
        pytest.param(8, Gaussian(n=64), LocalPosterior(gamma=3.0, n_beta=5.0, metric="euclidean"), id="8 of 64"),
        pytest.param(64, Gaussian(n=256), LocalPosterior(gamma=3.0, n_beta=20.0, metric="euclidean"), id="64 of 256"),
        pytest.param(
            64, Gaussian(n=256, stiffness=1), LocalPosterior(gamma=9.0, n_beta=90.0, metric="euclidean"), id="noisy"
        ),
    ],
)
def test_minibatches_leave_sizes_and_intervals_right(size, gaussian, posterior):
    tuning = tuned(gaussian, posterior, batch_size=size)
    assert tuning.batch_size == size
    assert tuning.heat <= MAX_HEAT
    slope, coverage = size_and_coverage(gaussian, posterior, tuning, tuning.sampler)
    assert slope == pytest.approx(1, abs=0.03)
    assert coverage >= 0.9


def test_the_step_that_curvature_alone_allows_would_be_heated_by_as_much_as_is_stated():
    gaussian = Gaussian(n=256, stiffness=1)
    posterior = LocalPosterior(gamma=9.0, n_beta=90.0, metric="euclidean")
    exact = tuned(gaussian, posterior)
    by_hand = tuned(gaussian, posterior, batch_size=16, step_size=exact.sampler.step_size)
    assert by_hand.sampler == exact.sampler
    slope, coverage = size_and_coverage(gaussian, posterior, by_hand, by_hand.sampler)
    assert slope > 1.1
    assert coverage < 0.85
    assert 0.5 * by_hand.heat < slope - 1 < 1.5 * by_hand.heat


def test_where_minibatches_cost_more_than_the_training_set_it_is_used():
    gaussian = Gaussian(n=64, stiffness=1)
    posterior = LocalPosterior(gamma=1.0, n_beta=100.0, metric="euclidean")
    tuning = tuned(gaussian, posterior, batch_size=8)
    assert tuning.batch_size is None
    assert tuning.heat == 0
    assert tuning.sampler == tuned(gaussian, posterior).sampler


@pytest.mark.parametrize(("n", "size"), [(64, 8), (60, 8), (40, 15), (24, 12), (24, 20)])
def test_correlation_of_minibatches_is_that_of_their_means(n, size):
    values = np.random.default_rng(0).standard_normal(n)
    values -= values.mean()
    batches = reshuffled(n, size, torch.Generator().manual_seed(0))
    means = np.array([values[next(batches)].mean() for _ in range(20_000)])
    lags = epoch_correlation(n, size).numpy()
    measured = [np.mean(means[lag:] * means[:-lag]) / means.var() for lag in range(1, len(lags) + 1)]
    np.testing.assert_allclose(measured, lags, atol=0.02)
    # and once an epoch is over nothing is left of it
    beyond = len(lags) + 1
    assert abs(np.mean(means[beyond:] * means[:-beyond])) < 0.02 * means.var()


@pytest.mark.parametrize("size", [8, 16, 40])
def test_noise_is_the_largest_variance_over_directions_and_few_minibatches_do_not_make_it_less(size):
    gaussian, n_beta, n = Gaussian(n=64), 5.0, 64
    hessians = torch.from_numpy(gaussian.losses["train"][0])
    u = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = reshuffled(n, size, torch.Generator().manual_seed(1))

    def gradient(u):
        return Gradient(n_beta * u @ hessians[next(batches)].mean(0), u)

    found = np.mean([gradient_noise(gradient, u, n, size) for _ in range(60)])
    # each sample's share in the variance of a mean of ``size`` of ``n``
    forces = n_beta * torch.einsum("kj,nij->nki", u, hessians - hessians.mean(0))
    covariance = torch.einsum("nki,nkj->ij", forces, forces) / len(u) / (n - 1) * (1 / size - 1 / n)
    assert 0.9 < found / float(torch.linalg.eigvalsh(covariance)[-1]) < 1.6


@pytest.mark.parametrize("sampler", [SGLD(0.05), Underdamped(0.3, 1.0)])
def test_heating_by_noise_that_is_new_at_every_step_is_the_textbooks(sampler):
    none = torch.zeros(0, dtype=torch.float64)
    expected = 0.05 * 7.0 / 4 if isinstance(sampler, SGLD) else 0.3 * 7.0 / 2
    assert sampler.heating(7.0, 9.0, none) == pytest.approx(expected)
    # over an epoch that is short beside the motion, minibatches cancel
    short = replace(sampler, step_size=sampler.step_size / 100)
    assert short.heating(7.0, 9.0, epoch_correlation(64, 8)) < 0.05 * short.heating(7.0, 9.0, none)
