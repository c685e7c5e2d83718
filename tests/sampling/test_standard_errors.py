"""Intervals made from the scatter of the chains contain the truth as often as they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian import Gaussian, walk

from stagewise.influence.covariance import correlation_replicates, covariance_replicates, mean_and_stderr
from stagewise.sampling import SGLD, LocalPosterior, Underdamped
from stagewise.sampling.base import Gradient

GAUSSIAN = Gaussian(n=64)
POSTERIOR = LocalPosterior(gamma=3.0, n_beta=5.0)
PRECISION, _ = GAUSSIAN.precision(POSTERIOR)
SLOW, FAST = np.linalg.eigvalsh(PRECISION)[[0, -1]]
REPETITIONS = 200
ROWS = slice(0, 6)


def exact_gradient(u):
    return Gradient(u @ torch.from_numpy(PRECISION), u)


def estimates(estimator, sampler, gradient, chains, draws, thinning):
    """Value and standard error of every pair of 6 training and 3 query losses, of many independent runs."""
    burn_in = int(5 * sampler.relaxation(SLOW))
    u = walk(sampler, gradient, REPETITIONS * chains, draws, burn_in=burn_in, thinning=thinning)
    train, val = GAUSSIAN.traces("train", u)[..., ROWS], GAUSSIAN.traces("val", u)
    runs = zip(np.split(train, REPETITIONS), np.split(val, REPETITIONS), strict=True)
    values, stderrs = zip(*(mean_and_stderr(estimator(a, b)) for a, b in runs), strict=True)
    return np.stack(values), np.stack(stderrs)


def truth(estimator, law):
    covariance = GAUSSIAN.loss_covariance(law, "train", "val")[ROWS]
    if estimator is covariance_replicates:
        return covariance
    train, val = (np.diag(GAUSSIAN.loss_covariance(law, name, name)) for name in ("train", "val"))
    return covariance / np.sqrt(train[ROWS, None] * val)


@pytest.mark.parametrize("estimator", [covariance_replicates, correlation_replicates])
@pytest.mark.parametrize(
    ("chains", "draws", "thinning"),
    [
        pytest.param(64, 16, 2, id="many short chains"),
        pytest.param(4, 400, 1, id="few long chains of autocorrelated draws"),
    ],
)
def test_intervals_cover_the_exact_value(estimator, chains, draws, thinning):
    sampler = Underdamped.tuned(SLOW, FAST)
    values, stderrs = estimates(estimator, sampler, exact_gradient, chains, draws, thinning)
    covered = abs(values - truth(estimator, GAUSSIAN.law(POSTERIOR))) < 1.96 * stderrs
    assert covered.mean() >= 0.9
    assert covered.mean(0).min() >= 0.85


def shared_minibatches(size, centred):
    """As ``potential_gradient`` with a control variate; the chains of a run share minibatches, runs do not."""
    hessians = torch.from_numpy(GAUSSIAN.losses["train"][0])
    pull = 0.0 if centred else torch.from_numpy(GAUSSIAN.gradients("train").mean(0))
    random = torch.Generator().manual_seed(1)

    def epochs():
        while True:
            order = torch.rand(REPETITIONS, len(hessians), generator=random).argsort(1)
            yield from order.split(size, 1)

    rows = epochs()

    def gradient(u):
        change = u.view(REPETITIONS, -1, 4) @ hessians[next(rows)].mean(1)
        return Gradient(POSTERIOR.n_beta * (change.view_as(u) + pull) + POSTERIOR.gamma * u, u)

    return gradient


@pytest.mark.parametrize("centred", [True, False])
def test_minibatches_shared_by_16_chains_do_not_make_intervals_lie(centred):
    sampler, gradient = Underdamped.tuned(SLOW, FAST), shared_minibatches(16, centred)
    values, stderrs = estimates(covariance_replicates, sampler, gradient, 16, 32, 2)
    law = GAUSSIAN.law(replace(POSTERIOR, centred=centred))
    covered = abs(values - truth(covariance_replicates, law)) < 1.96 * stderrs
    assert covered.mean() >= 0.9


def test_standard_error_that_ignored_autocorrelation_would_not_cover():
    sampler = SGLD.tuned(SLOW, FAST)
    law = GAUSSIAN.law(POSTERIOR, np.linalg.inv(PRECISION - sampler.step_size * PRECISION @ PRECISION / 4))

    def independent(a, b):
        a, b = (trace - trace.mean((0, 1)) for trace in (a, b))
        return (a[..., :, None] * b[..., None, :]).reshape(-1, a.shape[-1], b.shape[-1])

    def coverage(estimator):
        values, stderrs = estimates(estimator, sampler, exact_gradient, 4, 200, 2)
        return (abs(values - truth(covariance_replicates, law)) < 1.96 * stderrs).mean()

    assert coverage(independent) < 0.8
    assert coverage(covariance_replicates) >= 0.9
