import json

import numpy as np
import pytest
import xarray as xr
from regression import Regression
from synthetic_traces import Traces, losses, tree

from stagewise.influence.susceptibility import susceptibilities
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior

N_BETA, GAMMA = 300.0, 30.0
PARTS = {"first": slice(0, 1), "rest": slice(1, 3)}


@pytest.fixture
def trusting(monkeypatch):
    """Every checkpoint is fine, without the cost of finding out."""
    verdict = xr.Dataset({"verdict": "ok", "advice": ""})
    monkeypatch.setattr("stagewise.influence.trusted.diagnose", lambda *_: verdict)


@pytest.fixture(scope="module")
def problem():
    return Regression.random(n=6, d=3)


@pytest.fixture(scope="module")
def sampled(problem):
    """One cell by component, each moving some of the weights only."""

    def cell(part):
        pattern = f"weight[:, {part.start}:{part.stop}]"
        posterior = LocalPosterior(gamma=GAMMA, n_beta=N_BETA, parameters=(pattern,))
        return sample_block(problem.task, problem.trajectory().load(10), posterior, Chains(draws=128))

    return {name: Traces({10: cell(part)}) for name, part in PARTS.items()}


def exact(problem, part):
    """-Cov(L, l_m - L) over the Gaussian in which a part of the weights moves, of quadratic losses."""
    x, residuals = problem.x[:, part], problem.x @ problem.w - problem.y
    slopes, curvatures = residuals[:, None] * x, x[:, :, None] * x[:, None]
    covariance = np.linalg.inv(N_BETA * curvatures.mean(0) + GAMMA * np.eye(x.shape[1]))
    slope, curved = slopes.mean(0), curvatures.mean(0) @ covariance
    first = (slopes - slope) @ covariance @ slope
    second = np.einsum("ab,mba->m", curved, (curvatures - curvatures.mean(0)) @ covariance) / 2
    return -(first + second)


def test_linear_regression_has_the_exact_susceptibilities_of_gaussian_posteriors(problem, sampled):
    got = susceptibilities(sampled)
    assert got["value"].dims == ("step", "component", "sample")
    for name, part in PARTS.items():
        true, one = exact(problem, part), got.sel(component=name, step=10)
        assert (np.abs(one["value"] - true) < 4 * one["stderr"]).all()
        assert one["stderr"].max() < 0.15 * np.abs(true).max()  # tight enough to notice a wrong factor


def test_the_value_is_minus_the_covariance_of_the_mean_loss_with_the_contrast():
    train = losses(5)
    got = susceptibilities({"head": Traces({0: tree(train, {"val": train})})})
    flat = train.reshape(-1, 5)
    mean = flat.mean(1)
    expected = [-np.cov(mean, flat[:, m] - mean)[0, 1] for m in range(5)]
    np.testing.assert_allclose(got["value"][0, 0], expected, rtol=0, atol=1e-12)
    spread = got["replicates"].std("replicate", ddof=1) / np.sqrt(got.sizes["replicate"])
    np.testing.assert_allclose(got["stderr"], spread, rtol=1e-12)


def test_values_of_all_data_have_mean_zero_by_their_shares():
    train = losses(4)
    cell = tree(train, {"val": train})
    share = np.array([0.1, 0.2, 0.3, 0.4])
    cell["train"] = cell["train"].to_dataset().assign(share=("sample", share))
    got = susceptibilities({"head": Traces({0: cell})})
    assert np.abs(got["value"].values[0, 0] @ share) < 1e-12
    assert np.abs(got["value"]).max() > 0.01


def test_a_component_that_moves_one_datum_only_expresses_it_and_no_other():
    train = np.ones((16, 20, 4))
    train[..., 2] += np.random.default_rng(0).normal(size=(16, 20)) ** 2
    value = susceptibilities({"head": Traces({0: tree(train, {"val": train})})})["value"][0, 0]
    assert value[2] < 0
    assert (value[[0, 1, 3]] > 0).all()


def test_groups_have_the_mean_over_their_samples_and_tokens_that_of_their_own_loss():
    train = losses(3, 2)
    traces = {"head": Traces({0: tree(train, {"val": train})})}
    whole, by_token = susceptibilities(traces), susceptibilities(traces, tokens=True)
    assert by_token["sample"].values.tolist()[:3] == ["0/0", "0/1", "1/0"]
    np.testing.assert_allclose(by_token["value"].values.reshape(3, 2).mean(1), whole["value"][0, 0], atol=1e-12)
    grouped = susceptibilities(traces, groups=list("aba"))["value"].sel(sample="a")
    np.testing.assert_allclose(grouped, whole["value"][..., [0, 2]].mean("sample"), rtol=1e-9)


def test_standardised_values_are_z_scores_of_each_component_without_the_mean_of_all(sampled):
    plain, got = susceptibilities(sampled), susceptibilities(sampled, standardised=True)
    z = (plain["value"] - plain["value"].mean("sample")) / plain["value"].std("sample")
    np.testing.assert_allclose(got["value"], z - z.mean("component"), rtol=0, atol=1e-9)
    assert got["value"].attrs["units"] == "1"
    assert (got["stderr"] > 0).all()


def test_standard_errors_of_standardised_values_are_as_large_as_their_scatter(trusting):
    random = np.random.default_rng(0)
    weights = random.uniform(0.5, 2, (2, 5))

    def standardised_of(seed):
        noise = np.random.default_rng(seed).normal(size=(2, 16, 20, 1))
        parts = {str(k): Traces({0: tree(weights[k] * noise[k], {"val": noise[k]})}) for k in range(2)}
        own = np.random.default_rng([seed, 1]).normal(size=(2, 16, 20, 5))
        for k, traces in enumerate(parts.values()):
            traces.trees[0]["train"]["loss"].values += own[k]
        return susceptibilities(parts, standardised=True)

    found = [standardised_of(seed) for seed in range(40)]
    scatter = np.std([each["value"].values for each in found], axis=0, ddof=1)
    claimed = np.sqrt(np.mean([each["stderr"].values ** 2 for each in found], axis=0))
    assert 0.8 < np.sqrt((claimed**2).mean() / (scatter**2).mean()) < 1.3


def test_only_checkpoints_that_all_components_can_answer_are_left_and_others_are_named():
    good, lost = (tree(losses(4, seed=k), {"val": losses(3)}, failed=range(k)) for k in (0, 12))
    parts = {"a": Traces({1: good, 2: good}), "b": Traces({1: lost, 2: good})}
    got = susceptibilities(parts)
    assert got["step"].values.tolist() == [2]
    assert json.loads(got.attrs["omitted"])["1"].startswith("b: chains failed")
    with pytest.raises(ValueError, match="no checkpoint in common"):
        susceptibilities({"a": Traces({1: good}), "b": Traces({2: good})})


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (tree(losses(4), {"val": losses(3)}, kappa=3.0), {}, r"different n_beta, \[20.0, 30.0\]"),
        (tree(losses(5), {"val": losses(3)}), {}, "the data differ"),
        (tree(losses(4), {"val": losses(3)}, sampler="window"), {}, "are of a posterior"),
        (None, {"standardised": True}, "got 1, expected 2 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, options, message):
    parts = {"a": tree(losses(4), {"val": losses(3)})} | ({} if other is None else {"b": other})
    with pytest.raises(ValueError, match=message):
        susceptibilities({name: Traces({0: cell}) for name, cell in parts.items()}, **options)
