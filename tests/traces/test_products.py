"""Chains that are right, or wrong in ways that only groups, or the products of their losses, show."""

import numpy as np
import pytest
from test_diagnostics import ar1, cell, group

from stagewise.influence.covariance import covariance_replicates, mean_and_stderr
from stagewise.traces.diagnostics import diagnose
from stagewise.traces.products import MOST_PAIRS, _pairs
from stagewise.traces.stretches import stretches

LABELS = {"train": list("aabb"), "queries": {"val": list("xxyy")}}
SIGNS = np.array([1.0, 1.0, -1.0, -1.0])


def opposed(u, seed, noise=0.5):
    """Train and query losses that move together by +u and by -u, so that the mean loss does not see it."""
    rng = np.random.default_rng([seed, 1])
    return [u[..., None] * SIGNS + noise * rng.standard_normal((*u.shape, 4)) for _ in range(2)]


def diagnosed(u, seed=0, noise=0.5, labels=LABELS):
    train, query = opposed(u, seed, noise)
    return diagnose(cell(group(train), queries={"val": group(query)}), labels)


def white(chains, draws, seed):
    return np.random.default_rng(seed).standard_normal((chains, draws))


def per_chain(chains, seed):
    return np.random.default_rng([seed, 2]).standard_normal((chains, 1))


@pytest.mark.parametrize(("chains", "draws"), [(4, 200), (8, 64)])
def test_independent_draws_are_ok(chains, draws):
    verdicts = [diagnosed(white(chains, draws, seed), seed)["verdict"].item() for seed in range(15)]
    assert set(verdicts) == {"ok"}


def test_many_independent_groups_are_not_called_wrong_by_chance():
    labels = {"train": list("abcdefgh"), "queries": {"val": list("abcdefgh")}}
    for seed in range(8):
        losses = np.random.default_rng(seed).standard_normal((2, 8, 64, 8))
        result = diagnose(cell(group(losses[0]), queries={"val": group(losses[1])}), labels)
        assert result["verdict"] == "ok", result["advice"].item()


WRONG = {
    "too slow": lambda seed: ar1(4, 200, 0.998, seed),
    "offset": lambda seed: white(4, 200, seed) + per_chain(4, seed),
    "of different width": lambda seed: white(4, 200, seed) * np.exp(0.6 * per_chain(4, seed)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_chains_whose_stated_errors_are_half_of_what_they_are_have_not_converged_though_mean_losses_are_fine(kind):
    values, squares = [], []
    for seed in range(300):
        rows = [side.reshape(4, 200, 2, 2).mean(-1) for side in opposed(WRONG[kind](seed), seed)]
        value, stderr = mean_and_stderr(covariance_replicates(*rows, pieces=stretches(4, 200)))
        values.append(value)
        squares.append(stderr**2)
    assert np.sqrt(np.var(values, 0).mean() / np.mean(squares)) > 2
    results = [diagnosed(WRONG[kind](seed), seed) for seed in range(20)]
    assert sum(result["verdict"].item() == "not converged" for result in results) >= 17
    assert all(result["rhat"] < 1.1 and result["ess_bulk"] > 20 and abs(result["drift"]) < 4 for result in results)


def test_chains_that_pair_losses_in_opposite_ways_are_seen_by_their_products_alone():
    u, sign = white(8, 64, 0), np.repeat([1.0, -1.0], 4)[:, None]
    (train, _), (_, query) = opposed(u, 0, 0.1), opposed(sign * u, 0, 0.1)
    result = diagnose(cell(group(train), queries={"val": group(query)}), LABELS)
    assert result["verdict"] == "not converged"
    assert "products of losses that influence averages" in result["advice"].item()
    assert result["rhat_rows"] < 1.05
    assert result["rhat_products"] > 1.5


def test_covariances_of_chains_that_differ_by_more_than_their_stretches_are_named_by_the_f_test():
    widths = np.array([0.75, 0.9, 1.1, 1.25])[:, None]
    result = diagnosed(white(4, 200, 0) * widths)
    assert result["rhat_products"] < 1.1
    assert result["chains_p"] < 1e-3
    assert "standard errors would be too small" in result["advice"].item()


def test_a_group_that_drifts_is_seen_though_the_mean_loss_does_not():
    result = diagnosed(white(8, 64, 0) + np.linspace(-1.5, 1.5, 64))
    assert abs(result["drift"]) < 4
    assert "the losses of a group still drift" in result["advice"].item()


def test_numbers_agree_with_known_laws():
    u = white(4, 500, 0)
    u = (u - u.mean(1, keepdims=True)) / u.std(1, keepdims=True)
    apart = diagnosed(u + np.array([[-1.0], [1.0], [-1.0], [1.0]]), noise=1e-3)
    np.testing.assert_allclose(apart["between_share"], 0.5, rtol=1e-3)
    line = np.linspace(-1.5, 1.5, 500)
    np.testing.assert_allclose(diagnosed(u + line, noise=1e-3)["drift_share"], 0.75 / 1.75, atol=0.03)
    still = diagnosed(u, noise=1e-3)
    # The square of a standard normal number has variance 2.
    np.testing.assert_allclose(still["mcse_products"], np.sqrt(2 / u.size), rtol=0.1)
    np.testing.assert_allclose(still["ess_products"], u.size, rtol=0.15)
    ps = [diagnosed(white(4, 64, seed))["chains_p"].item() for seed in range(20)]
    assert min(ps) > 1e-3
    assert 0.3 < np.mean(ps) < 0.7


def test_chains_that_are_one_replicate_each_have_no_f_test():
    result = diagnosed(white(16, 64, 0))
    assert "chains_p" not in result
    assert "rhat_products" in result


@pytest.mark.parametrize(("train", "queries", "count"), [(3, 2, 6), (500, 1, MOST_PAIRS), (30, 40, MOST_PAIRS)])
def test_the_pairs_are_few_and_reach_from_the_first_row_to_the_last(train, queries, count):
    losses = np.random.default_rng(0).standard_normal((2, 8, train + queries))
    groups = {"train": group(losses[..., :train]), "queries/val": group(losses[..., train:])}
    a, b = _pairs(groups, {"train": None, "queries": {"val": list(range(queries))}})
    assert a.shape == b.shape == (2, 8, count)
    np.testing.assert_allclose((a[..., 0], a[..., -1]), (losses[..., 0], losses[..., train - 1]))
    np.testing.assert_allclose((b[..., 0], b[..., -1]), (losses[..., train], losses[..., -1]))


def test_rows_are_the_means_of_groups_by_the_shares_of_their_losses():
    losses = np.random.default_rng(0).standard_normal((2, 8, 4))
    share = np.array([0.1, 0.3, 0.2, 0.4])
    a, b = _pairs({"train": group(losses), "queries/val": group(losses, share=share)}, LABELS)
    np.testing.assert_allclose(a[..., 0], losses[..., :2].mean(-1))
    np.testing.assert_allclose(b[..., 1], (losses[..., 2:] * share[2:]).sum(-1) / 0.6)


def test_losses_that_are_large_beside_their_changes_give_the_same_numbers():
    train, query = opposed(white(4, 64, 0), 0)
    plain = diagnose(cell(group(train), queries={"val": group(query)}), LABELS)
    far = diagnose(cell(group(train + 1e7, anchor=1e7), queries={"val": group(query + 1e7, anchor=1e7)}), LABELS)
    for name in ("rhat_products", "ess_products", "between_share", "drift_share", "chains_p"):
        np.testing.assert_allclose(far[name], plain[name], rtol=1e-3)
