import numpy as np
import pytest
from scipy import stats

from stagewise.influence.covariance import (
    correlation_replicates,
    covariance_replicates,
    group_sums,
    mean_and_stderr,
)
from stagewise.traces.stretches import MIN_REPLICATES, stretches


def traces(chains=16, draws=10, columns=(3, 4), seed=0):
    """Two correlated sets of columns, whose chains also differ in their means."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(chains, draws, 1)) + random.normal(size=(chains, 1, 1))
    return [common + random.normal(size=(chains, draws, n)) for n in columns]


def flat(trace):
    return trace.reshape(-1, trace.shape[-1])


def numpy_cov(a, b, ddof=1):
    return np.cov(flat(a).T, flat(b).T, ddof=ddof)[: a.shape[-1], a.shape[-1] :]


def numpy_corr(a, b):
    return np.corrcoef(flat(a).T, flat(b).T)[: a.shape[-1], a.shape[-1] :]


def ar1(random, chains, draws, columns, phi):
    """Stationary autoregressive chains of unit variance."""
    noise = random.normal(size=(chains, draws, columns))
    trace = noise.copy()
    for t in range(1, draws):
        trace[:, t] = phi * trace[:, t - 1] + np.sqrt(1 - phi**2) * noise[:, t]
    return trace


@pytest.mark.parametrize(("chains", "draws"), [(16, 10), (40, 7), (4, 64), (1, 100)])
def test_pooled_is_the_covariance_of_all_draws(chains, draws):
    a, b = traces(chains, draws)
    used = slice(draws % stretches(chains, draws), None)
    value, _ = mean_and_stderr(covariance_replicates(a, b))
    np.testing.assert_allclose(value, numpy_cov(a[:, used], b[:, used]), rtol=0, atol=1e-12)


def test_within_is_the_mean_of_the_chains_own_covariances():
    a, b = traces()
    own = np.mean([numpy_cov(x[None], y[None]) for x, y in zip(a, b, strict=True)], axis=0)
    np.testing.assert_allclose(covariance_replicates(a, b, "within").mean(0), own, rtol=0, atol=1e-12)


def test_between_is_the_covariance_of_chain_means():
    a, b = traces(chains=5)
    means = [x.mean(1, keepdims=True) for x in (a[:, 2:], b[:, 2:])]
    replicates = covariance_replicates(a, b, "between", pieces=4)
    assert replicates.shape == (5, 3, 4)
    np.testing.assert_allclose(replicates.mean(0), numpy_cov(*means), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chains", [2, 16])
def test_pooled_splits_exactly_into_within_and_between(chains):
    draws = 16
    a, b = traces(chains, draws)
    pooled, within, between = (covariance_replicates(a, b, c).mean(0) for c in ("pooled", "within", "between"))
    parts = (chains * draws - chains) * within + draws * (chains - 1) * between
    np.testing.assert_allclose((chains * draws - 1) * pooled, parts, rtol=0, atol=1e-10)


def test_two_phases_obey_the_law_of_total_covariance():
    random = np.random.default_rng(1)
    centres = {"U": np.array([0.0, 1.0]), "V": np.array([3.0, -1.5])}
    phases = {name: random.normal(size=(6 if name == "U" else 2, 50, 2)) + c for name, c in centres.items()}
    within = {name: numpy_cov(x, x, ddof=0) for name, x in phases.items()}
    delta = flat(phases["U"]).mean(0) - flat(phases["V"]).mean(0)
    expected = 0.75 * within["U"] + 0.25 * within["V"] + 0.75 * 0.25 * np.outer(delta, delta)

    trace = np.concatenate([phases["U"], phases["V"]])
    pooled = covariance_replicates(trace, trace).mean(0) * (1 - 1 / 400)
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-12)
    assert pooled[0, 1] < -1 < within["U"][0, 1]  # phases that disagree on two losses couple them negatively


@pytest.mark.parametrize(("chains", "draws"), [(16, 10), (4, 64)])
def test_correlation_is_that_of_all_draws(chains, draws):
    a, b = traces(chains, draws)
    np.testing.assert_allclose(correlation_replicates(a, b).mean(0), numpy_corr(a, b), rtol=0, atol=1e-12)


def test_correlation_within_and_between_chains():
    a, b = traces()
    deviations = [x - x.mean(1, keepdims=True) for x in (a, b)]
    got = correlation_replicates(a, b, centring="within").mean(0)
    np.testing.assert_allclose(got, numpy_corr(*deviations), rtol=0, atol=1e-12)
    means = [x.mean(1, keepdims=True) for x in (a, b)]
    got = correlation_replicates(a, b, centring="between").mean(0)
    np.testing.assert_allclose(got, numpy_corr(*means), rtol=0, atol=1e-12)


def test_correlation_of_groups_is_the_sum_over_pairs_replicate_by_replicate():
    a, b = traces(columns=(5, 6))
    groups_a, groups_b = [np.array([0, 3]), np.array([1, 2, 4])], [np.array([5]), np.arange(5)]
    pairs = correlation_replicates(a, b)
    sums = np.stack([pairs[:, :, group].sum(-1) for group in groups_b], -1)
    sums = np.stack([sums[:, group].sum(1) for group in groups_a], 1)
    np.testing.assert_allclose(correlation_replicates(a, b, groups_a, groups_b), sums, rtol=0, atol=1e-11)
    half = np.stack([pairs[:, group].sum(1) for group in groups_a], 1)
    np.testing.assert_allclose(correlation_replicates(a, b, groups_a, None), half, rtol=0, atol=1e-11)


def test_covariance_of_group_sums_is_the_sum_over_pairs():
    a, b = traces()
    groups = [np.array([0, 2]), np.array([1])]
    pairs = covariance_replicates(a, b)
    sums = np.stack([pairs[:, group].sum(1) for group in groups], 1)
    np.testing.assert_allclose(covariance_replicates(group_sums(a, groups), b), sums, rtol=0, atol=1e-11)


def test_correlation_is_blind_to_scale_and_reports_no_doubt_about_itself():
    a, b = traces()
    value, stderr = mean_and_stderr(correlation_replicates(a, b))
    scaled, doubt = mean_and_stderr(correlation_replicates(1e-6 * a, 1e6 * b))
    np.testing.assert_allclose(scaled, value, atol=1e-12)
    np.testing.assert_allclose(doubt, stderr, atol=1e-12)
    own, no_doubt = mean_and_stderr(correlation_replicates(a, a))
    np.testing.assert_allclose(np.diag(own), 1, atol=1e-12)
    np.testing.assert_allclose(np.diag(no_doubt), 0, atol=1e-12)


@pytest.mark.parametrize("shape", [(16,), (16, 3, 4)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, 1e5, 1e7, 1e9])
def test_standard_errors_survive_a_mean_of_any_size(mean, shape):
    """Sums of squares alone lose what is small beside the mean."""
    replicates = mean + np.random.default_rng(0).normal(size=shape)
    value, stderr = mean_and_stderr(replicates)
    np.testing.assert_allclose(value, replicates.mean(0))
    np.testing.assert_allclose(stderr, replicates.std(0, ddof=1) / 4, rtol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9])  # the mean of many 0.1 is not 0.1
def test_a_loss_that_never_changes_is_correlated_with_nothing(constant):
    a, b = traces(chains=64, draws=50)
    a[..., 1] = constant
    for kind in (correlation_replicates, covariance_replicates):
        value, stderr = mean_and_stderr(kind(a, b))
        assert np.isfinite(value).all()
        assert np.isfinite(stderr).all()
    value, stderr = mean_and_stderr(correlation_replicates(a, b))
    assert not value[1].any()
    assert not stderr[1].any()
    assert (np.abs(value[[0, 2]]) > 0.1).all()


@pytest.mark.parametrize("phi", [0.0, 0.6])
@pytest.mark.parametrize(("chains", "draws"), [(2, 400), (4, 200), (64, 16)])
@pytest.mark.parametrize("estimate", [covariance_replicates, correlation_replicates])
def test_the_95_percent_interval_holds_the_truth_nineteen_times_in_twenty(estimate, chains, draws, phi):
    random, repetitions, rho = np.random.default_rng(2), 200, 0.5
    a = ar1(random, chains, draws, repetitions, phi)
    b = rho * a + np.sqrt(1 - rho**2) * ar1(random, chains, draws, repetitions, phi)
    replicates = estimate(a, b)
    value, stderr = mean_and_stderr(replicates)
    reach = stats.t.isf(0.025, len(replicates) - 1) * stderr
    same = np.eye(repetitions, dtype=bool)
    assert 0.90 <= (np.abs(value - rho) < reach)[same].mean() <= 0.985
    assert 0.92 <= (np.abs(value) < reach)[~same].mean() <= 0.97  # independent losses: no false influence


def test_few_long_chains_are_cut_so_that_the_standard_error_is_itself_known():
    assert stretches(64, 10) == 1
    assert 2 * stretches(2, 400) >= MIN_REPLICATES
    assert stretches(1, 12) == 3  # but never into stretches too short to be independent
    assert covariance_replicates(*traces(chains=2, draws=64)).shape == (16, 3, 4)


def test_draws_that_fill_no_stretch_are_the_earliest():
    a, b = traces(chains=1, draws=67)
    late = [x[:, 3:] for x in (a, b)]
    np.testing.assert_array_equal(covariance_replicates(a, b), covariance_replicates(*late))


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="at least two chains, got 1"):
        covariance_replicates(*traces(chains=1), "between")
    with pytest.raises(ValueError, match="run more chains or draws"):
        mean_and_stderr(covariance_replicates(*traces(chains=1, draws=7)))
