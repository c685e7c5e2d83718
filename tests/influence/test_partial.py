"""Partial correlations: what is left of two losses without the mode in which all losses move together."""

import numpy as np
import pytest
from scipy import stats
from synthetic_traces import Traces, tree

from stagewise.influence import pairs
from stagewise.influence.bif import bif
from stagewise.influence.covariance import correlation_replicates, mean_and_stderr

CHAINS, DRAWS = 8, 20


def gaussian(covariance, seed=0):
    """Draws ``(chain, draw, variable)`` whose own covariance is exactly the one asked for."""
    draws = np.random.default_rng(seed).normal(size=(CHAINS * DRAWS, len(covariance)))
    draws -= draws.mean(0)
    whitened = draws @ np.linalg.inv(np.linalg.cholesky(draws.T @ draws / (len(draws) - 1))).T
    return 1 + (whitened @ np.linalg.cholesky(covariance).T).reshape(CHAINS, DRAWS, -1)


def random_covariance(size, seed=1):
    """With a strong common mode."""
    factors = np.random.default_rng(seed).normal(size=(size, 2 * size)) / np.sqrt(2 * size)
    return factors @ factors.T + 4.0


def residuals(covariance, sequence, trained):
    """The matrix that takes losses to their residuals on the mean of the training losses of all other sequences."""
    size = len(covariance)
    others = np.array([[t and sequence[i] != sequence[k] for k, t in enumerate(trained)] for i in range(size)], float)
    control = others / others.sum(1, keepdims=True)
    slopes = np.diag(control @ covariance) / np.diag(control @ covariance @ control.T)
    return np.eye(size) - slopes[:, None] * control


def expected(covariance, sequence, trained):
    left = residuals(covariance, sequence, trained)
    rest = left @ covariance @ left.T
    return -rest / np.sqrt(np.outer(np.diag(rest), np.diag(rest)))


def test_partial_correlations_of_a_gaussian_are_those_of_its_covariance():
    covariance = random_covariance(9)
    loss = gaussian(covariance)
    got = bif(Traces({0: tree(loss[..., :6], {"val": loss[..., 6:]})}), grouped=False, kind="partial")
    exact = expected(covariance, range(9), [True] * 6 + [False] * 3)
    np.testing.assert_allclose(got["value"][0], exact[:6, 6:], rtol=0, atol=1e-12)
    assert got.attrs["units"] == "1"
    assert got.attrs["kind"] == "partial"


def test_with_one_control_for_both_it_is_the_textbook_formula():
    covariance = random_covariance(3)
    loss = gaussian(covariance)
    a, b, control = (loss[..., k : k + 1] for k in range(3))
    r = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    exact = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    np.testing.assert_allclose(correlation_replicates(a, b, controls=(control, control)).mean(), exact, atol=1e-12)


@pytest.mark.parametrize("block", [40, 2**23])
def test_groups_of_tokens_leave_out_pairs_and_controls_of_the_same_sequence(monkeypatch, block):
    monkeypatch.setattr(pairs, "_BLOCK", block)
    covariance, sequence = random_covariance(12), np.repeat(np.arange(4), 3)
    loss = gaussian(covariance).reshape(CHAINS, DRAWS, 4, 3)
    of_train, of_query = (np.random.default_rng(k).choice(list(names), (4, 3)) for k, names in enumerate(["ab", "xy"]))
    traces = Traces({0: tree(loss, {"same": loss}, training_sets=["same"])})
    got = bif(traces, train_groups=of_train, query_groups={"same": of_query}, kind="partial", self_pairs=False)
    exact = expected(covariance, sequence, [True] * 12)
    for a in "ab":
        for b in "xy":
            pair = np.outer(of_train.ravel() == a, of_query.ravel() == b) & (sequence[:, None] != sequence)
            cell = got.sel(train=a, query=b).isel(step=0)
            np.testing.assert_allclose(cell["value"], exact[pair].mean(), rtol=0, atol=1e-12)
            assert cell["stderr"] > 0


def test_tokens_without_a_label_are_still_part_of_the_common_mode():
    covariance = random_covariance(6)
    loss = gaussian(covariance).reshape(CHAINS, DRAWS, 3, 2)
    traces = Traces({0: tree(loss, {"same": loss}, training_sets=["same"])})
    options = {"query_groups": {"same": [["a", None], [None, None], [None, "b"]]}, "kind": "partial"}
    got = bif(traces, train_groups=[[None, "c"], [None, None], [None, None]], **options)
    exact = expected(covariance, np.repeat(np.arange(3), 2), [True] * 6)
    np.testing.assert_allclose(got["value"].sel(train="c")[0], [exact[1, 0], exact[1, 5]], rtol=0, atol=1e-12)


def test_a_common_mode_that_makes_every_correlation_large_is_gone():
    random, samples = np.random.default_rng(0), 40
    loss = 3 * random.normal(size=(16, 100, 1)) + random.normal(size=(16, 100, samples + 5))
    traces = Traces({0: tree(loss[..., :samples], {"val": loss[..., samples:]})})
    full, partial = (bif(traces, grouped=False, kind=kind)["value"] for kind in ("correlation", "partial"))
    assert (full < -0.8).all()
    assert abs(partial).max() < 0.15
    assert abs(partial.mean()) < 0.01


def test_the_odd_part_is_freed_of_the_odd_common_mode():
    covariance = random_covariance(7)
    odd, even = gaussian(covariance), gaussian(random_covariance(7, seed=5), seed=3)
    sides = {"train": (even - odd)[..., :4], "queries/val": (even - odd)[..., 4:]}
    traces = Traces({0: tree((even + odd)[..., :4], {"val": (even + odd)[..., 4:]}, reflected=sides)})
    got = bif(traces, grouped=False, kind="partial", part="odd", trusted_only=False)
    exact = expected(covariance, range(7), [True] * 4 + [False] * 3)
    np.testing.assert_allclose(got["value"][0], exact[:4, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize(("chains", "draws"), [(4, 200), (64, 16)])
def test_the_95_percent_interval_holds_the_truth_nineteen_times_in_twenty(common, chains, draws):
    random, repetitions = np.random.default_rng(2), 300

    def noise():
        return random.normal(size=(chains, draws, repetitions))

    mode, own, shared = noise(), noise(), noise()
    # Without a common control, that of a tells of what is left of b: the slope's own error counts.
    of_a, of_b = (mode, mode) if common else (mode + shared, mode)
    a, b = 2 * of_a + own + 0.5 * noise(), of_b + own + (0 if common else shared) + 0.5 * noise()
    truth = 1 / 1.25 if common else 1 / np.sqrt(1.25 * 2.25)
    replicates = correlation_replicates(a, b, controls=(of_a, of_b))
    value, stderr = (np.diag(x) for x in mean_and_stderr(replicates))
    reach = stats.t.isf(0.025, len(replicates) - 1) * stderr
    assert 0.91 <= (np.abs(value - truth) < reach).mean() <= 0.985
    assert 0.85 < stderr.mean() / value.std() < 1.15


def test_losses_that_are_nothing_but_the_common_mode_are_correlated_with_nothing():
    loss = np.array([1.0, 2.0, 0.5, 3.0]) * gaussian(np.eye(1))
    got = bif(Traces({0: tree(loss[..., :3], {"val": loss[..., 3:]})}), grouped=False, kind="partial")
    assert not got["value"].any()
    assert not got["stderr"].any()


def test_a_single_training_sample_leaves_nothing_to_hold_fixed():
    loss = gaussian(random_covariance(2))
    with pytest.raises(ValueError, match="the traces have only one"):
        bif(Traces({0: tree(loss[..., :1], {"val": loss[..., 1:]})}), grouped=False, kind="partial")
