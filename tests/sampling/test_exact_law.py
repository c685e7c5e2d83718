"""Chains at a checkpoint draw from the posterior that theory gives, end to end, second order included.

To test another sampler, add its settings, and its ``steps`` if its step-size error can be seen at that many draws.
"""

import numpy as np
import pytest
from gaussian import Gaussian, draw, errors, law_errors

from stagewise.influence.covariance import covariance_replicates
from stagewise.sampling import Chains, LocalPosterior

GAUSSIAN = Gaussian()
MANY = {"chains": 1500, "draws": 8, "reflect": False, "batching": "stacked"}
SAMPLINGS = {
    "underdamped": Chains(**MANY),
    "sgld": Chains("sgld", **MANY),
    # gradients here are larger than RMSprop's stability constant, so that it is slower than its tuning assumes
    "rmsprop_sgld": Chains("rmsprop_sgld", **MANY | {"draws": 4}, burn_in=200, thinning=30),
}


def steps(sampler, posterior, fastest):
    """Euler's elementwise steps, whose error is exactly  covariance^-1 = A - A diag(steps) A / 4."""
    if sampler == "underdamped":
        return np.zeros(4)
    if sampler == "sgld":
        return np.full(4, 0.1 / fastest)
    law, scale = GAUSSIAN.law(posterior), GAUSSIAN.precision(posterior)[1]
    mean = GAUSSIAN.gradients("train", law.mean).mean(0)
    spread = np.diag(GAUSSIAN.hessian @ law.covariance @ GAUSSIAN.hessian)
    return 0.1 / fastest * 0.1 / (scale * np.sqrt(mean**2 + spread) + 0.1)


@pytest.mark.parametrize("sampler", SAMPLINGS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("metric", ["euclidean", "adam"])
def test_means_and_covariances_are_those_of_the_gaussian(sampler, centred, metric):
    posterior = LocalPosterior(gamma=3.0, n_beta=5.0, centred=centred, metric=metric)
    precision = GAUSSIAN.precision(posterior)[0]
    euler = precision @ np.diag(steps(sampler, posterior, np.linalg.eigvalsh(precision)[-1])) @ precision / 4
    law = GAUSSIAN.law(posterior, np.linalg.inv(precision - euler))
    deviations = law_errors(GAUSSIAN, law, draw(GAUSSIAN, posterior, SAMPLINGS[sampler]))
    assert np.mean(abs(deviations) < 3) >= 0.95


@pytest.mark.parametrize("missing", ["second order", "shift"])
def test_every_part_of_the_theory_would_be_missed_at_this_many_draws(missing):
    posterior = LocalPosterior(gamma=3.0, n_beta=5.0, centred=False)
    law = GAUSSIAN.law(posterior)
    if missing == "shift":
        unshifted = GAUSSIAN.law(LocalPosterior(gamma=3.0, n_beta=5.0, centred=True))
        wrong = GAUSSIAN.loss_covariance(unshifted, "train", "val")
    else:
        train, val = (GAUSSIAN.gradients(name, law.mean) for name in ("train", "val"))
        wrong = train @ law.covariance @ val.T
    traces = draw(GAUSSIAN, posterior, SAMPLINGS["underdamped"])
    deviations = errors(covariance_replicates(traces["train"], traces["val"]), wrong)
    assert np.mean(abs(deviations) < 3) < 0.8
