"""Verdicts on chains whose law is known: AR(1) around a known mean, drifting, disagreeing, beyond first order."""

import re
import warnings

import numpy as np
import pytest
import xarray as xr
from scipy.signal import lfilter

from stagewise.influence.trusted import _reason_to_omit
from stagewise.traces.diagnostics import diagnose, diagnose_run
from stagewise.traces.store import Cell, TraceStore

SAMPLES = 3


def ar1(chains, draws, rho, seed):
    """Stationary AR(1) chains of unit variance."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((chains, draws)) * np.sqrt(1 - rho**2)
    noise[:, 0] = rng.standard_normal(chains)
    return lfilter([1], [1, -rho], noise, axis=1)


def group(loss, reflected=None, anchor=0.0, share=None):
    """A data set; a loss without samples is shared by all of them."""
    loss = np.asarray(loss)
    if loss.ndim == 2:
        loss = np.repeat(loss[..., None], SAMPLES, axis=2)
    dims = ("chain", "draw", "sample", "token")[: loss.ndim]
    variables = {"loss": (dims, loss.astype(float))}
    if reflected is not None:
        variables["loss_reflected"] = (dims, np.asarray(reflected, float))
    shape = loss.shape[2:]
    variables["loss_anchor"] = (dims[2:], np.broadcast_to(np.asarray(anchor, float), shape).copy())
    variables["share"] = (dims[2:], np.full(shape, 1 / np.prod(shape)) if share is None else np.asarray(share, float))
    return xr.Dataset(variables, coords={"chain": np.arange(len(loss))})


def cell(train=None, statuses=None, queries=None, **facts):
    """The tree of a step."""
    groups = {} if train is None else {"/train": train} | {f"/queries/{k}": v for k, v in (queries or {}).items()}
    statuses = np.array(statuses or ["ok"] * train.sizes["chain"])
    chains = xr.Dataset({"status": ("chain", statuses)}, coords={"chain": np.arange(len(statuses))})
    tree = xr.DataTree.from_dict(groups | {"/chains": chains})
    tree.attrs = facts
    return tree


def verdict_of(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = diagnose(tree)
    numbers = [float(v) for v in result.data_vars.values() if v.dtype.kind == "f"]
    assert not np.isnan(numbers).any()
    return result["verdict"].item(), result["advice"].item()


# Chains that are good.


@pytest.mark.parametrize(("chains", "draws", "rho"), [(16, 64, 0.37), (4, 100, 0.37), (4, 800, 0.8), (16, 20, 0.0)])
def test_stationary_chains_are_ok(chains, draws, rho):
    verdicts = [verdict_of(cell(group(ar1(chains, draws, rho, seed)))) for seed in range(15)]
    assert verdicts.count(("ok", "")) >= 14


def test_numbers_agree_with_the_known_law_of_ar1_chains():
    chains, draws, rho, mean, anchor = 4, 500, 0.5, 2.25, 2.0
    losses = [ar1(chains, draws, rho, seed) + mean for seed in range(20)]
    results = [diagnose(cell(group(loss, anchor=anchor))) for loss in losses]
    independent = chains * draws * (1 - rho) / (1 + rho)
    ess = np.array([r["ess_bulk"] for r in results])
    mcse = np.array([r["mcse_mean"] for r in results])
    rise = np.array([r["loss_rise"] for r in results])
    np.testing.assert_allclose(ess.mean(), independent, rtol=0.05)
    np.testing.assert_allclose(mcse.mean(), independent**-0.5, rtol=0.05)
    np.testing.assert_allclose(rise, [loss.mean() - anchor for loss in losses], rtol=1e-5)
    z = (rise - (mean - anchor)) / [r["loss_rise_stderr"] for r in results]
    assert 0.7 < np.sqrt((z**2).mean()) < 1.3
    assert results[0]["loss_rise"].attrs["units"] == "nats"


def test_drift_of_stationary_chains_is_a_z_score():
    drifts = [float(diagnose(cell(group(ar1(4, 200, 0.5, seed))))["drift"]) for seed in range(30)]
    assert abs(np.mean(drifts)) < 0.5
    assert 0.7 < np.std(drifts) < 1.3


def test_losses_of_tokens_are_averaged_too():
    loss = ar1(4, 50, 0.3, 0)
    spread = np.random.default_rng(1).standard_normal((4, 50, 5, 7))
    spread -= spread.mean((2, 3), keepdims=True)
    tokens = diagnose(cell(group(loss[..., None, None] + spread)))
    plain = diagnose(cell(group(loss)))
    for name in ("rhat", "ess_bulk", "mcse_mean", "loss_rise", "drift"):
        np.testing.assert_allclose(tokens[name], plain[name], rtol=1e-3)


def test_every_loss_counts_by_its_share():
    # as where the loss returns weights: padding has none, and long sequences count more
    moving, still = ar1(4, 50, 0.3, 0), ar1(4, 50, 0.0, 1)
    loss = np.stack([moving + 2.0, still + 100.0, moving + 2.0], 2)
    weighted = diagnose(cell(group(loss, anchor=[2.0, 100.0, 2.0], share=[0.1, 0.0, 0.3])))
    plain = diagnose(cell(group(moving)))
    for name in ("rhat", "ess_bulk", "mcse_mean", "loss_rise", "drift"):
        np.testing.assert_allclose(weighted[name], plain[name], rtol=1e-6)


def test_a_constant_in_all_losses_changes_nothing():
    offset = diagnose(cell(mixture([1.0, -1.0], [0.1, 0.3], anchor=1e7)))
    plain = diagnose(cell(mixture([1.0, -1.0], [0.1, 0.3])))
    for name in ("rhat", "ess_bulk", "mcse_mean", "loss_rise", "drift", "even_share"):
        np.testing.assert_allclose(offset[name], plain[name], rtol=1e-5)
    assert offset["verdict"] == plain["verdict"] == "ok"


# Chains that have not converged.


def test_a_drift_is_seen_with_its_sign_and_asks_for_a_longer_burn_in():
    trend = np.linspace(0, 2, 100)
    for sign in (1, -1):
        tree = cell(group(ar1(4, 100, 0.3, 0) + sign * trend), burn_in=40)
        assert sign * diagnose(tree)["drift"] > 4
        verdict, advice = verdict_of(tree)
        assert verdict == "not converged"
        assert f"drift ({'+' if sign > 0 else '-'}" in advice
        assert "burn_in (about 2 times: 40 -> 80)" in advice


def test_independent_draws_are_told_of_no_setting_that_they_have_not():
    apart = np.array([-1.5, -0.5, 0.5, 1.5])[:, None]
    verdict, advice = verdict_of(cell(group(ar1(4, 50, 0.0, 0) + apart), sampler="window", window=12))
    assert verdict == "not converged"
    assert advice.endswith("independent of all others; take more draws")
    failed = cell(group(ar1(4, 50, 0.0, 0)), ["diverged"] * 4, sampler="window", window=12)
    assert verdict_of(failed)[1] == "4 of 4 chains failed (4 diverged); use a window of at most 6 training steps"


def test_chains_that_disagree_have_the_r_hat_of_their_offsets():
    offsets = np.array([-1.5, -0.5, 0.5, 1.5])[:, None]
    tree = cell(group(ar1(4, 400, 0.2, 0) + offsets))
    result = diagnose(tree)
    np.testing.assert_allclose(result["rhat"], np.sqrt(1 + offsets.var(ddof=1)), rtol=0.1)
    verdict, advice = verdict_of(tree)
    assert verdict == "not converged"
    assert f"R-hat {result['rhat'].item():.2f}, should be below 1.1" in advice


def test_slow_chains_are_told_how_much_thinning_they_need():
    tree = cell(group(ar1(64, 20, 0.86, 0)), thinning=3)
    assert diagnose(tree)["ess_bulk"] < 5 * 64
    verdict, advice = verdict_of(tree)
    assert verdict == "not converged"
    factor, before, after = (
        float(n) for n in re.search(r"thinning \(about (\S+) times: (\S+) -> (\S+)\)", advice).groups()
    )
    assert (before, after) == (3, 3 * factor)
    # Thinned that much, an AR(1) chain of as many draws is worth at least the five that were asked for.
    rho = 0.86**factor
    assert 20 * (1 - rho) / (1 + rho) > 5


def test_the_worst_of_all_data_sets_decides():
    good, bad = ar1(4, 100, 0.3, 0), ar1(4, 100, 0.3, 1) + np.linspace(0, 3, 100)
    for train, query in ((good, bad), (bad, good)):
        result = diagnose(cell(group(train), queries={"a": group(good), "b": group(query)}))
        assert result["verdict"] == "not converged"
        assert result["drift"] > 4
    apart = diagnose(cell(group(good), queries={"val": group(good + np.arange(4)[:, None])}))
    assert apart["rhat"] > 1.1
    np.testing.assert_allclose(apart["mcse_mean"], diagnose(cell(group(good)))["mcse_mean"])  # of the training loss


def test_chains_frozen_at_different_losses_are_not_converged():
    verdict, advice = verdict_of(cell(group(np.repeat(np.arange(4.0)[:, None], 20, axis=1))))
    assert verdict == "not converged"
    assert "R-hat inf" in advice


def test_a_jump_between_two_frozen_halves_is_a_drift():
    verdict, advice = verdict_of(cell(group(np.repeat([[0.0] * 10 + [1.0] * 10], 4, axis=0))))
    assert verdict == "not converged"
    assert "drift (+inf" in advice


def test_a_query_whose_loss_never_moves_does_not_disturb():
    train = group(ar1(4, 100, 0.3, 0))
    still = cell(train, queries={"solved": group(np.zeros((4, 100)))})
    xr.testing.assert_equal(diagnose(still), diagnose(cell(train)))


# Chains that failed.


def test_failed_chains_are_counted_and_left_out():
    loss = ar1(5, 100, 0.3, 0)
    alone = diagnose(cell(group(loss[:3])))
    loss[3:] = np.nan
    result = diagnose(cell(group(loss), statuses=["ok", "ok", "ok", "diverged", "diverged"]))
    assert (result["chains_ok"].item(), result["chains_failed"].item()) == (3, 2)
    assert result["verdict"] == "ok"
    for name in ("rhat", "ess_bulk", "mcse_mean", "loss_rise", "drift"):
        np.testing.assert_array_equal(result[name], alone[name])


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"step_size": 0.1, "stable_step": 0.05}, "leave step_size out, or set it to 0.05"),
        ({"step_size": 0.05, "stable_step": 0.05, "window": 30}, "use a window of at most 15 training steps"),
        ({"step_size": 0.05, "stable_step": 0.05, "window": 1}, "leave this step out"),
        ({"step_size": 0.05, "stable_step": 0.05, "gamma": 3.0}, "use a larger gamma (about 2 times: 3 -> 6)"),
    ],
)
def test_fewer_than_half_of_the_chains_ok_blames_the_step_only_where_it_is_longer_than_the_curvature_asks(
    settings, remedy
):
    tree = cell(group(ar1(5, 100, 0.3, 0)), ["ok", "diverged", "stuck", "diverged", "ok"], **settings)
    verdict, advice = verdict_of(tree)
    assert verdict == "chains failed"
    assert advice.startswith("3 of 5 chains failed (2 diverged, 1 stuck)")
    assert advice.endswith(remedy)


def test_no_chain_ok_is_a_verdict_and_not_an_error():
    verdict, _ = verdict_of(cell(group(np.full((2, 50), np.nan)), ["diverged", "diverged"]))
    assert verdict == "chains failed"


# Posteriors that do not exist.


@pytest.mark.parametrize(
    ("largest", "remedy"),
    [
        (12.9, "use a window of at most 12 training steps"),
        (0.7, "leave this step out"),
        (None, "use a shorter window"),
        (float("inf"), "use a shorter window"),
    ],
)
def test_a_checkpoint_that_is_not_localised_names_the_largest_window_that_works(largest, remedy):
    tree = cell(statuses=["not_localised"] * 4, localised=False, largest_window=largest)
    verdict, advice = verdict_of(tree)
    assert verdict == "not localised"
    assert remedy in advice
    result = diagnose(tree)
    assert (result["chains_ok"].item(), result["chains_failed"].item(), result["draws"].item()) == (0, 4, 0)
    assert not result["localised"]
    assert "rhat" not in result


# Posteriors wider than first order.


def mixture(odd, even, seed=0, chains=8, draws=400, anchor=0.0):
    """Losses ``odd_i u + even_i (v^2 - 1) / sqrt 2`` of normal u, v: variances odd_i^2 and even_i^2."""
    u, v = np.random.default_rng(seed).standard_normal((2, chains, draws, 1))
    first, second = np.asarray(odd) * u, np.asarray(even) * (v**2 - 1) / np.sqrt(2)
    return group(anchor + first + second, reflected=anchor + second - first, anchor=anchor)


@pytest.mark.parametrize(("odd", "even"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.1), (1.0, 1.0), (0.5, 1.5)])
def test_even_share_is_the_share_of_the_second_order(odd, even):
    result = diagnose(cell(mixture([odd, -odd, 2 * odd], [even, even, even])))
    share = 3 * even**2 / (3 * even**2 + 6 * odd**2)
    np.testing.assert_allclose(result["even_share"], share, atol=0.05)
    assert (result["verdict"] == "beyond first order") == (share > 0.2)


def test_a_minimum_where_only_the_mean_loss_lacks_a_first_order_is_ok():
    tree = cell(mixture(odd=[1.0, -1.0], even=[0.1, 0.1]))
    series = tree["train"]["loss"].mean("sample") + tree["train"]["loss_reflected"].mean("sample")
    assert series.var() > 0  # the mean loss moves at second order only
    assert diagnose(tree)["even_share"] < 0.02
    assert verdict_of(tree)[0] == "ok"


def test_the_data_set_with_the_largest_even_share_decides():
    first, second = mixture([1.0], [0.1]), mixture([0.1], [1.0])
    for train, query in ((first, second), (second, first)):
        result = diagnose(cell(train, queries={"val": query}))
        np.testing.assert_allclose(result["even_share"], 1 / 1.01, atol=0.02)


def test_raising_n_beta_as_advised_makes_the_second_order_small():
    odd, even = np.array([1.0, 0.7]), np.array([0.8, 0.9])
    verdict, advice = verdict_of(cell(mixture(odd, even), n_beta=10))
    assert verdict == "beyond first order"
    after = float(re.search(r"n_beta .*10 -> (\S+)\)", advice)[1])
    # A posterior narrower by the root of the factor: first order shrinks with it, second with its square.
    narrower = np.sqrt(10 / after)
    remedied = diagnose(cell(mixture(odd * narrower, even * narrower**2)))
    assert 0.03 < remedied["even_share"] < 0.06
    assert remedied["verdict"] == "ok"


def test_without_reflected_losses_there_is_no_even_share():
    assert "even_share" not in diagnose(cell(group(ar1(4, 100, 0.3, 0))))


# Queries that the training data do not hold.


def scaled(size, anchor=(0.0, 1.0, 0.5, 0.2)):
    """Losses of one size that are odd in the weights."""
    anchor, draws = np.asarray(anchor), ar1(4, 100, 0.3, 0)[..., None] * size
    return group(anchor + draws, reflected=anchor - draws, anchor=anchor)


def unconstrained(train, **queries):
    """The verdict, and the numbers that it rests on."""
    result = diagnose(cell(train, queries=queries))
    return result["verdict"].item(), result["query_spread"].item(), result["query_reach"].item()


def test_a_query_whose_loss_runs_wild_is_named_and_its_checkpoint_is_not_trusted():
    wild = scaled(0.1)
    for name in ("loss", "loss_reflected"):
        wild[name][..., 2] = wild["loss_anchor"][2] + 30 * (wild[name][..., 2] - wild["loss_anchor"][2])
    tree = cell(scaled(0.1), queries={"val": scaled(0.1), "odd": wild}, n_beta=10.0)
    verdict, advice = verdict_of(tree)
    assert verdict == "unconstrained"
    assert "sample 2 of 'odd' varies 30 times as much" in advice
    assert "parameters=" in advice
    assert "window" in advice
    assert "n_beta does not help" in advice
    assert _reason_to_omit(tree, True, (verdict, advice), None).startswith("unconstrained")


@pytest.mark.parametrize(("size", "verdict"), [(9.0, "ok"), (11.0, "unconstrained")])
def test_queries_may_vary_ten_times_as_much_as_training_samples(size, verdict):
    found, spread, reach = unconstrained(scaled(1.0), val=scaled(size))
    np.testing.assert_allclose((spread, reach), (size, size * ar1(4, 100, 0.3, 0).std()), rtol=1e-6)  # range 1
    assert found == verdict


def test_where_the_network_fits_every_training_sample_queries_alone_vary_and_that_is_no_fault():
    fitted = scaled(1e-4, anchor=(1e-4, 2e-4, 3e-4, 1e-4))
    found, spread, _ = unconstrained(fitted, val=scaled(0.3, anchor=(0.0, 6.0, 0.1, 0.2)))
    assert spread > 1000
    assert found == "ok"


def test_the_largest_of_the_training_samples_is_the_measure():
    train = scaled(0.001)
    for name in ("loss", "loss_reflected"):
        train[name][..., 1] = train["loss_anchor"][1] + 1000 * (train[name][..., 1] - train["loss_anchor"][1])
    assert unconstrained(train, val=scaled(9.0))[0] == "ok"


def test_a_query_loss_in_units_of_its_own_is_not_compared():
    other = scaled(1000.0).assign_attrs(own_loss=True)
    assert "query_spread" not in diagnose(cell(scaled(1.0), queries={"margin": other}))
    assert unconstrained(scaled(1.0), margin=other, val=scaled(2.0))[:2] == ("ok", pytest.approx(2.0))


def test_tokens_of_a_query_are_averaged_by_their_share_before_they_are_compared():
    # a token without weight, and two that cancel each other
    draws = ar1(4, 100, 0.3, 0)[..., None, None] * np.array([[50.0, 1.0, 0.0], [100.0, -100.0, 2.0]])
    share = np.array([[0.0, 0.25, 0.25], [0.2, 0.2, 0.1]])
    query = group(draws, anchor=np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 1.0]]), share=share)
    _, spread, _ = unconstrained(scaled(1.0), val=query)
    np.testing.assert_allclose(spread, 0.5, rtol=1e-6)


# What cannot be said.


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (cell(group(ar1(1, 100, 0.3, 0))), "too few chains ended ok (1)"),
        (cell(group(ar1(2, 100, 0.3, 0)), ["ok", "diverged"]), "too few chains ended ok (1)"),
        (cell(group(ar1(4, 3, 0.3, 0))), "too few draws per chain (3)"),
        (cell(group(ar1(4, 1, 0.3, 0))), "too few draws per chain (1)"),
        (cell(group(np.ones((4, 100)))), "hardly changes"),
    ],
)
def test_what_cannot_be_said_is_said_with_the_reason_and_without_nan(tree, reason):
    verdict, advice = verdict_of(tree)
    assert verdict == "cannot say"
    assert reason in advice
    assert "rhat" not in diagnose(tree)


@pytest.mark.parametrize("draws", [8, 9, 10, 11])
def test_the_fewest_draws_that_are_judged_give_numbers(draws):
    verdict, _ = verdict_of(cell(group(ar1(2, draws, 0.0, 0))))
    assert verdict != "cannot say"


def test_the_most_severe_verdict_wins():
    drifting = mixture([0.0, 0.0], [1.0, 1.0], chains=2)
    second, wild = mixture([0.0, 0.0], [1.0, 1.0]), mixture([0.0, 0.0], [50.0, 50.0])
    wild["loss_anchor"][0] += 0.1
    drifting["loss"] += xr.DataArray(np.linspace(0, 9, 400), dims="draw")
    drifting["loss_reflected"] += xr.DataArray(np.linspace(0, 9, 400), dims="draw")
    verdicts = [
        verdict_of(cell(drifting, ["diverged", "diverged"], localised=False, unusable="no optimiser"))[0],
        verdict_of(cell(drifting, ["diverged", "diverged"], localised=False))[0],
        verdict_of(cell(drifting, ["diverged", "diverged"]))[0],
        verdict_of(cell(drifting, ["diverged", "ok"]))[0],
        verdict_of(cell(drifting))[0],
        verdict_of(cell(second, queries={"val": wild}))[0],
        verdict_of(cell(second))[0],
    ]
    assert verdicts == [
        "unusable",
        "not localised",
        "chains failed",
        "cannot say",
        "not converged",
        "unconstrained",
        "beyond first order",
    ]


def test_a_checkpoint_that_cannot_be_used_gives_its_reason_as_advice():
    tree = cell(statuses=["unusable"] * 4, unusable="the learning rate at step 0 is 0")
    assert verdict_of(tree) == ("unusable", "the learning rate at step 0 is 0")
    assert _reason_to_omit(tree, False, verdict_of(tree), None) == "unusable: the learning rate at step 0 is 0"


# A whole run.


def test_a_run_is_diagnosed_step_by_step(tmp_path):
    store = TraceStore.open(tmp_path / "run", {"model": "a"})
    trees = {
        0: cell(statuses=["not_localised"] * 4, localised=False, largest_window=3.0),
        10: cell(group(ar1(4, 100, 0.3, 0), anchor=0.5), localised=True),
        500: cell(group(ar1(4, 100, 0.3, 0) + np.linspace(0, 3, 100)), localised=True, burn_in=9),
    }
    for step, tree in trees.items():
        store.write(Cell(step, 0, "k"), tree)
    result = diagnose_run(store)
    for folder in (store.root, str(store.root)):
        xr.testing.assert_identical(diagnose_run(folder), result)
    assert result["step"].values.tolist() == [0, 10, 500]
    assert result["verdict"].values.tolist() == ["not localised", "ok", "not converged"]
    assert result["localised"].values.tolist() == [False, True, True]
    assert result["chains_ok"].values.tolist() == [0, 4, 4]
    assert "even_share" not in result
    assert result["loss_rise"].attrs["units"] == "nats"
    for step, tree in trees.items():
        for name, value in diagnose(tree).data_vars.items():
            stored, own = result[name].sel(step=step).item(), value.item()
            assert stored == (pytest.approx(own, rel=1e-3) if isinstance(own, float) else own)
    assert np.isnan(result["rhat"].sel(step=0))


def test_a_run_without_a_cell_says_so(tmp_path):
    with pytest.raises(ValueError, match="no complete cell yet"):
        diagnose_run(TraceStore.open(tmp_path / "run", {"model": "a"}))
