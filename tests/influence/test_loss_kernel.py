import json

import numpy as np
import pytest
import xarray as xr
from regression import Regression
from scipy import stats
from synthetic_traces import Traces, losses, tree

from stagewise.influence.bif import bif
from stagewise.influence.loss_kernel import loss_kernel
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior


@pytest.fixture
def trusting(monkeypatch):
    """Every checkpoint is fine, without the cost of finding out."""
    verdict = xr.Dataset({"verdict": "ok", "advice": ""})
    monkeypatch.setattr("stagewise.influence.trusted.diagnose", lambda *_: verdict)


def flat(loss):
    return loss.reshape(loss.shape[0] * loss.shape[1], -1).T


def test_the_kernel_is_the_correlation_of_the_draws_and_minus_the_influence_on_the_same_samples():
    train = losses(5)
    traces = Traces({7: tree(train, {"val": train}, training_sets=["val"])})
    got, influence = loss_kernel(traces), bif(traces, kind="correlation", grouped=False)
    assert got["value"].dims == ("step", "sample", "other")
    np.testing.assert_allclose(got["value"][0], np.corrcoef(flat(train)), rtol=0, atol=1e-12)
    for name, sign in (("value", -1), ("stderr", 1), ("replicates", -1)):
        np.testing.assert_allclose(got[name], sign * influence[name].values, rtol=0, atol=1e-12)
    assert got["replicate"].equals(influence["replicate"])


def test_a_sample_is_itself_without_doubt_and_one_that_never_changes_is_like_none():
    train = losses(4)
    train[..., 2] = 0.5
    got = loss_kernel(Traces({0: tree(train, {"val": train})})).isel(step=0)
    np.testing.assert_allclose(np.diag(got["value"]), [1, 1, 0, 1], atol=1e-12)
    assert np.diag(got["stderr"]).max() < 1e-12
    assert not got["value"].values[2].any()


def test_gaussian_posterior_of_linear_regression_has_the_exact_kernel():
    problem = Regression.random(n=6, d=3)
    n_beta, gamma = 6e4, 5e3
    posterior = LocalPosterior(gamma=gamma, n_beta=n_beta)
    cell = sample_block(problem.task, problem.trajectory().load(10), posterior, Chains())
    got = loss_kernel(Traces({10: cell})).isel(step=0)
    _, covariance = problem.posterior(n_beta / 6, gamma, np.ones(6))
    residuals, moves = problem.x @ problem.w - problem.y, problem.x @ covariance @ problem.x.T
    exact = np.outer(residuals, residuals) * moves + moves**2 / 2  # of first and of second order
    exact /= np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    other = ~np.eye(6, dtype=bool)
    z = (got["value"].values - exact)[other] / got["stderr"].values[other]
    assert np.abs(z).max() < 4
    assert got["stderr"].values.max() < 0.1  # tight enough to notice a wrong entry


def test_standard_errors_cover_the_exact_correlation_as_often_as_they_say(trusting):
    rho, covered = 0.6, 0
    for seed in range(100):
        common, own = (np.random.default_rng([seed, k]).normal(size=(16, 40, 3)) for k in (0, 1))
        train = np.sqrt(rho) * common[..., :1] + np.sqrt(1 - rho) * own
        got = loss_kernel(Traces({0: tree(train, {"val": train})}))
        covered += abs(got["value"][0, 0, 1] - rho) < stats.t.ppf(0.95, 15) * got["stderr"][0, 0, 1]
    assert stats.binomtest(int(covered), 100, 0.9).pvalue > 1e-3


def test_a_group_is_its_mean_loss_and_not_the_mean_of_its_pairs():
    train, labels = losses(6), np.array(list("abacab"))
    traces = Traces({0: tree(train, {"val": train})}, {"train": labels, "queries": {}})
    got = loss_kernel(traces, groups=labels).isel(step=0)
    means = np.stack([train[..., labels == name].mean(-1) for name in "abc"], -1)
    assert got["sample"].values.tolist() == got["other"].values.tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(got["value"], np.corrcoef(flat(means)), rtol=0, atol=1e-12)
    assert "label" not in got.coords


def test_tokens_are_rows_of_their_own_and_carry_the_label_of_their_sample():
    train = losses(3, 2)
    traces = Traces({0: tree(train, {"val": train})}, {"train": np.array(list("xyx")), "queries": {"val": None}})
    got = loss_kernel(traces, tokens=True)
    assert got["sample"].values.tolist() == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]
    assert got["label"].values.tolist() == list("xxyyxx")
    np.testing.assert_allclose(got["value"][0], np.corrcoef(flat(train)), rtol=0, atol=1e-12)


def test_labels_of_the_whole_training_set_are_found_by_the_numbers_of_the_candidates():
    train = losses(3)
    cell = tree(train, {"val": train})
    cell["train"] = cell["train"].to_dataset().assign_coords(sample=[4, 0, 2])
    got = loss_kernel(Traces({0: cell}, {"train": np.array(list("abcde")), "queries": {"val": None}}))
    assert (got["sample"].values.tolist(), got["label"].values.tolist()) == (["4", "0", "2"], list("eac"))


def test_steps_are_chosen_and_those_that_are_not_there_or_not_to_be_trusted_are_named():
    whole, lost = (tree(losses(4, seed=k), {"val": losses(3)}, failed=range(k)) for k in (0, 12))
    traces = Traces({1: whole, 2: lost, 3: whole})
    assert loss_kernel(traces, steps=[3])["step"].values.tolist() == [3]
    got = loss_kernel(traces)
    assert got["step"].values.tolist() == [1, 3]
    assert "12 of 16 chains failed" in json.loads(got.attrs["omitted"])["2"]
    with pytest.raises(ValueError, match=r"steps \[4\] are not in the traces, which have \[1, 2, 3\]"):
        loss_kernel(traces, steps=[3, 4])
    with pytest.raises(ValueError, match=r"expected labels of shape \(4,\), got \(3,\)"):
        loss_kernel(traces, groups=list("abc"))
