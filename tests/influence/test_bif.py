import json

import numpy as np
import pytest
import xarray as xr
from synthetic_traces import Traces, losses, tree

from stagewise.influence.bif import bif


@pytest.fixture
def verdicts(monkeypatch):
    """Verdict and advice by step, in place of the real diagnosis."""
    table = {}

    def diagnose(tree, _labels):
        verdict, advice = table.get(tree.attrs.get("step"), ("ok", ""))
        return xr.Dataset({"verdict": verdict, "advice": advice})

    monkeypatch.setattr("stagewise.influence.trusted.diagnose", diagnose)
    return table


def columns(loss):
    return loss.reshape(loss.shape[0] * loss.shape[1], -1).T


def cov(a, b):
    a, b = columns(a), columns(b)
    return np.cov(a, b)[: len(a), len(a) :]


def test_the_value_is_minus_kappa_times_the_covariance_of_the_draws():
    train, query = losses(5), losses(3, seed=1)
    got = bif(Traces({7: tree(train, {"val": query}, kappa=2.5)}), grouped=False)
    assert got["value"].dims == ("step", "train", "query")
    assert got["replicates"].dims == ("step", "replicate", "train", "query")
    np.testing.assert_allclose(got["value"][0], -2.5 * cov(train, query), rtol=0, atol=1e-12)
    np.testing.assert_allclose(got["replicates"].mean("replicate"), got["value"], rtol=0, atol=1e-12)
    spread = got["replicates"].std("replicate", ddof=1) / np.sqrt(got.sizes["replicate"])
    np.testing.assert_allclose(got["stderr"], spread, rtol=1e-12)


def test_the_result_says_what_it_is():
    traces = Traces({7: tree(losses(5), {"val": losses(3)}, window=30)})
    got = bif(traces, grouped=False)
    assert got["train"].values.tolist() == ["0", "1", "2", "3", "4"]
    assert got["step"].values.tolist() == [7]
    assert got.attrs["sign"].startswith("negative = helpful")
    assert got.attrs["units"] == got["value"].attrs["units"] == "nats per unit weight"
    assert (got.attrs["estimator"], got.attrs["n_beta"], got.attrs["window"]) == ("bif", 20.0, 30)
    assert bif(traces, kind="correlation").attrs["units"] == "1"


def test_the_correlation_is_minus_that_of_the_draws_whatever_kappa():
    train, query = losses(5), losses(3, seed=1)
    expected = -np.corrcoef(columns(train), columns(query))[:5, 5:]
    for kappa in (1.0, 100.0):
        traces = Traces({7: tree(train, {"val": query}, kappa=kappa)})
        got = bif(traces, grouped=False, kind="correlation")
        np.testing.assert_allclose(got["value"][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("centring", ["within", "between"])
def test_centring_reaches_the_estimate(centring):
    train, query = losses(4), losses(3, seed=1)
    train += np.linspace(0, 5, len(train))[:, None, None]  # chains that have not mixed
    means = [x.mean(1, keepdims=True) for x in (train, query)]
    expected = cov(*means) if centring == "between" else np.mean([*map(cov, train[:, None], query[:, None])], axis=0)
    got = bif(Traces({7: tree(train, {"val": query})}), grouped=False, centring=centring, trusted_only=False)
    np.testing.assert_allclose(got["value"][0], -2 * expected, rtol=0, atol=1e-12)


def polynomial(random, samples, u, degrees):
    coefficients = random.normal(size=(len(degrees), samples))
    return sum(c * u[..., None] ** k for c, k in zip(coefficients, degrees, strict=True))


@pytest.mark.parametrize(("part", "degrees"), [("odd", (1, 3)), ("even", (0, 2, 4))])
def test_odd_and_even_parts_are_the_covariance_of_the_odd_and_even_powers(part, degrees):
    u = np.random.default_rng(0).normal(size=(16, 30)) + 0.3  # not symmetric: parts must be exact draw by draw

    def both(u, degrees):
        random = np.random.default_rng(5)
        powers = {k: polynomial(random, 4, u, (k,)) for k in range(5)}
        return sum(powers[k] for k in degrees)

    full, mirrored = both(u, range(5)), both(-u, range(5))
    reflected = {"train": mirrored, "queries/val": mirrored[..., :2]}
    traces = Traces({0: tree(full, {"val": full[..., :2]}, reflected=reflected)})
    got = bif(traces, part=part, grouped=False, trusted_only=False)
    wanted = both(u, degrees)
    np.testing.assert_allclose(got["value"][0], -2 * cov(wanted, wanted[..., :2]), rtol=0, atol=1e-11)


def test_the_odd_part_of_pure_curvature_is_nothing_where_the_full_value_looks_helpful():
    u = np.random.default_rng(0).normal(size=(16, 30, 1))
    bowls = np.array([1.0, 2.0, 0.5]) * u**2
    reflected = {"train": bowls, "queries/val": bowls}
    traces = Traces({0: tree(bowls, {"val": bowls}, reflected=reflected)})
    assert (bif(traces, grouped=False, trusted_only=False)["value"] < -0.1).all()
    odd = bif(traces, grouped=False, trusted_only=False, part="odd")
    assert not odd["value"].any()
    assert not odd["stderr"].any()


def test_parts_need_reflected_losses():
    with pytest.raises(ValueError, match="part='odd' needs traces sampled with reflect=True"):
        bif(Traces({0: tree(losses(4), {"val": losses(2)})}), part="odd")


def test_failed_chains_leave_no_trace():
    train, query = losses(4), losses(3, seed=1)
    broken = [x.copy() for x in (train, query)]
    for x in broken:
        x[[2, 9]] = np.nan
    got = bif(Traces({0: tree(broken[0], {"val": broken[1]}, failed=(2, 9))}), grouped=False)
    ok = [chain for chain in range(16) if chain not in (2, 9)]
    np.testing.assert_allclose(got["value"][0], -2 * cov(train[ok], query[ok]), rtol=0, atol=1e-12)
    assert got["replicate"].values.tolist() == ok


def test_replicates_belong_to_the_same_chains_at_every_checkpoint():
    trees = {step: tree(losses(4, seed=step), {"val": losses(3)}, failed=(step,)) for step in (1, 2)}
    got = bif(Traces(trees), grouped=False)
    both = [chain for chain in range(16) if chain not in (1, 2)]
    assert got["replicate"].values.tolist() == both
    for step in (1, 2):  # while the value uses every chain that its own checkpoint has
        ok = [chain for chain in range(16) if chain != step]
        expected = -2 * cov(losses(4, seed=step)[ok], losses(3)[ok])
        np.testing.assert_allclose(got["value"].sel(step=step), expected, rtol=0, atol=1e-12)


def test_untrusted_checkpoints_are_left_out_with_the_reason(verdicts):
    trees = {step: tree(losses(4, seed=step), {"val": losses(3)}, step=step) for step in (1, 2, 3, 4)}
    verdicts |= {2: ("not converged", "use a longer burn_in"), 3: ("beyond first order", "raise n_beta")}
    got = bif(Traces(trees))
    assert got["step"].values.tolist() == [1, 3, 4]
    assert json.loads(got.attrs["omitted"]) == {"2": "not converged: use a longer burn_in"}
    everything = bif(Traces(trees), trusted_only=False)
    assert everything["step"].values.tolist() == [1, 2, 3, 4]
    assert json.loads(everything.attrs["omitted"]) == {}


@pytest.mark.parametrize("verdict", ["not localised", "chains failed", "not converged", "cannot say"])
def test_nothing_to_trust_is_an_error_that_says_why(verdicts, verdict):
    verdicts |= {1: (verdict, "do this"), 2: (verdict, "do that")}
    trees = {step: tree(losses(4), {"val": losses(3)}, step=step) for step in (1, 2)}
    with pytest.raises(ValueError, match=f"step 1: {verdict}: do this; step 2: {verdict}: do that"):
        bif(Traces(trees))


def test_an_empty_store_is_an_error():
    with pytest.raises(ValueError, match="The store is empty"):
        bif(Traces({}))


@pytest.mark.parametrize("trusted_only", [True, False])
def test_a_checkpoint_where_nothing_was_drawn_is_omitted_with_the_real_reason(trusted_only):
    status = xr.Dataset({"status": ("chain", ["not_localised"] * 3)}, {"chain": range(3)})
    nothing = xr.DataTree.from_dict({"chains": status})
    nothing.attrs = {"localised": False, "largest_window": 12}
    drawn = tree(losses(4), {"val": losses(3)})
    got = bif(Traces({5: nothing, 6: drawn}), trusted_only=trusted_only)
    assert got["step"].values.tolist() == [6]
    assert "window of at most 12 training steps" in json.loads(got.attrs["omitted"])["5"]


def test_chains_that_all_failed_are_omitted_even_untrusted():
    dead = tree(losses(4), {"val": losses(3)}, failed=range(16))
    with pytest.raises(ValueError, match="step 5: chains failed"):
        bif(Traces({5: dead}), trusted_only=False)


def test_one_replicate_has_no_spread_and_is_refused():
    short = tree(losses(4, chains=1, draws=5), {"val": losses(3, chains=1, draws=5)})
    with pytest.raises(ValueError, match="run more chains or draws"):
        bif(Traces({5: short}), trusted_only=False)
