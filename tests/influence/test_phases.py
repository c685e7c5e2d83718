import json

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from synthetic_traces import Traces, losses, tree

from stagewise.influence.bif import bif
from stagewise.influence.phases import phase_decomposition

PARTS = ("weight", "mean_train", "mean_query", "within", "between", "total")


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """Every checkpoint is fine: chains that stay in one phase never converge."""
    monkeypatch.setattr("stagewise.influence.trusted.diagnose", lambda *_: xr.Dataset({"verdict": "ok", "advice": ""}))


def draw_phases(*weights, chains=16, draws=20, seed=0):
    names = np.array(["before", "during", "after"])[: len(weights)]
    return np.random.default_rng(seed).choice(names, size=(chains, draws), p=weights)


def population_cov(a, b):
    """Covariance of the columns of two traces (draw, column), divided by N."""
    return (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)


@pytest.mark.parametrize("weights", [(0.4, 0.6), (0.2, 0.3, 0.5)])
def test_parts_are_those_of_the_formula_and_add_up_to_the_pooled_influence(weights):
    train, query, labels = losses(5), losses(3, seed=1), draw_phases(*weights)
    train += 2 * (labels == "after")[..., None] * np.arange(5)
    traces = Traces({7: tree(train, {"val": query}, kappa=2.5)})
    got = phase_decomposition(traces, {7: labels}, grouped=False).sel(step=7)
    a, b, of = train.reshape(320, 5), query.reshape(320, 3), labels.ravel()
    names = got["phase"].values.tolist()
    assert names == sorted(set(of))
    between = np.zeros((5, 3))
    for k, u in enumerate(names):
        share, inside = np.mean(of == u), of == u
        np.testing.assert_allclose(got["weight"].sel(phase=u), share, rtol=1e-12)
        np.testing.assert_allclose(got["mean_train"].sel(phase=u), a[inside].mean(0), rtol=1e-12)
        np.testing.assert_allclose(got["mean_query"].sel(phase=u), b[inside].mean(0), rtol=1e-12)
        expected = -2.5 * share * population_cov(a[inside], b[inside])
        np.testing.assert_allclose(got["within"].sel(phase=u), expected, rtol=0, atol=1e-12)
        for v in names[k + 1 :]:
            shifts = [x[of == u].mean(0) - x[of == v].mean(0) for x in (a, b)]
            between -= 2.5 * share * np.mean(of == v) * np.outer(*shifts)
    np.testing.assert_allclose(got["between"], between, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got["within"].sum("phase") + got["between"], got["total"], rtol=0, atol=1e-12)
    pooled = bif(traces, grouped=False)["value"].sel(step=7)
    np.testing.assert_allclose(got["total"], pooled * 319 / 320, rtol=0, atol=1e-12)


def mixture(correlations, shifts, weight=0.5, chains=16, draws=200, seed=0):
    """Losses of one train and one query sample: unit Gaussians of these correlations, and phase means 0 and shifts."""
    random = np.random.default_rng(seed)
    phase = (random.random((chains, draws)) < weight).astype(int)
    x, y = random.normal(size=(2, chains, draws))
    rho = np.array(correlations)[phase]
    train = x + shifts[0] * phase
    query = rho * x + np.sqrt(1 - rho**2) * y + shifts[1] * phase
    return Traces({0: tree(train[..., None], {"val": query[..., None]}, kappa=2.0)}), {0: phase}


@pytest.mark.parametrize("shifts", [(1.5, 2.0), (1.5, -2.0)])
def test_mixture_of_gaussians_has_its_known_parts_of_either_sign(shifts):
    traces, phases = mixture((0.6, -0.4), shifts, weight=0.3, draws=2000)
    got = phase_decomposition(traces, phases).squeeze()
    truth = {"within": [-2 * 0.7 * 0.6, 2 * 0.3 * 0.4], "between": -2 * 0.21 * shifts[0] * shifts[1]}
    truth |= {"weight": [0.7, 0.3], "mean_train": [0, shifts[0]], "mean_query": [0, shifts[1]]}
    truth["total"] = np.sum(truth["within"]) + truth["between"]
    for name, value in truth.items():
        assert (np.abs(got[name] - value) < 4 * got[f"{name}_stderr"]).all(), name
        assert (got[f"{name}_stderr"] < 0.05).all(), name
    assert got["phase"].values.tolist() == ["0", "1"]


def test_standard_errors_cover_the_truth_with_the_doubt_of_the_phase_means():
    covered = {"within": 0, "between": 0, "mean_query": 0, "weight": 0, "total": 0}
    c = stats.t.ppf(0.95, 15)
    truth = {"within": 0.0, "between": -2 * 0.25 * 0.5, "mean_query": 1.0, "weight": 0.5, "total": -2 * 0.25 * 0.5}
    for seed in range(50):
        traces, phases = mixture((0.0, 0.0), (0.5, 1.0), draws=60, seed=seed)
        got = phase_decomposition(traces, phases).squeeze()
        for name in covered:
            one = got.sel(phase="1")
            covered[name] += bool(np.abs(one[name] - truth[name]) < c * one[f"{name}_stderr"])
    for name, count in covered.items():
        assert stats.binomtest(count, 50, 0.9).pvalue > 1e-3, name


def test_labels_of_chains_give_a_mean_doubt_that_grows_with_the_scatter_of_chains():
    random, labels = np.random.default_rng(0), np.repeat([0, 1], 8)
    offsets = random.normal(size=16) + 3 * labels  # chains that never move
    loss = offsets[:, None, None] * np.ones((16, 10, 1))
    got = phase_decomposition(Traces({0: tree(loss, {"val": loss})}), {0: labels}).squeeze()
    np.testing.assert_allclose(got["mean_train"], [offsets[:8].mean(), offsets[8:].mean()])
    expected = np.array([offsets[:8].std(ddof=1), offsets[8:].std(ddof=1)]) / np.sqrt(8)
    np.testing.assert_allclose(got["mean_train_stderr"], expected, rtol=0.05)
    delta, doubt = np.diff(got["mean_train"]).item(), np.hypot(*expected)
    assert got["between_stderr"].item() == pytest.approx(2 * 2 / 4 * delta * doubt, rel=0.1)


def test_one_phase_leaves_nothing_between():
    traces = Traces({0: tree(losses(4), {"val": losses(3)})})
    got = phase_decomposition(traces, {0: np.full(16, "only")})
    np.testing.assert_allclose(got["between"], 0, atol=1e-13)
    np.testing.assert_allclose(got["between_stderr"], 0, atol=1e-13)
    np.testing.assert_allclose(got["within"].sel(phase="only"), got["total"], rtol=1e-12)
    np.testing.assert_allclose(got["within_stderr"].sel(phase="only"), got["total_stderr"], rtol=1e-12)


def test_a_phase_that_no_draw_visits_has_weight_zero_and_no_mean():
    trees = {step: tree(losses(4, seed=step), {"val": losses(3)}) for step in (1, 2, 3)}
    labels = draw_phases(0.5, 0.5)
    got = phase_decomposition(Traces(trees), {2: np.full(16, "during"), 1: labels})
    assert got["step"].values.tolist() == [1, 2]
    missing = got.sel(step=2, phase="before")
    for name in ("weight", "weight_stderr", "within", "within_stderr"):
        assert not missing[name].any(), name
    for name in ("mean_train", "mean_train_stderr", "mean_query"):
        assert np.isnan(missing[name]).all(), name
    present = got.drop_sel(step=2)
    assert all(np.isfinite(variable).all() for variable in present.data_vars.values())


def test_a_phase_seen_by_a_single_chain_does_not_feign_certainty():
    labels = np.full(16, "before")
    labels[5] = "after"
    got = phase_decomposition(Traces({0: tree(losses(4), {"val": losses(3)})}), {0: labels}).sel(step=0)
    assert np.isnan(got["between_stderr"]).all()
    assert np.isnan(got["mean_train_stderr"].sel(phase="after")).all()
    assert np.isfinite(got["between"]).all()
    assert (got["within_stderr"].sel(phase="after") > 0.5 * np.abs(got["within"].sel(phase="after"))).all()


def test_groups_and_shared_samples_are_treated_as_by_bif_in_every_part():
    loss, labels = losses(6), draw_phases(0.3, 0.7)
    cell = tree(loss, {"val": loss, "other": losses(3, seed=1)}, training_sets=("val",))
    groups = {"train_groups": list("aabbbb"), "query_groups": {"val": list("ababab")}, "self_pairs": False}
    traces = Traces({0: cell})
    got = phase_decomposition(traces, {0: labels}, **groups)
    pooled = bif(traces, **groups)
    assert got["query"].values.tolist() == ["val:a", "val:b", "other"]
    np.testing.assert_allclose(got["total"], pooled["value"] * 319 / 320, rtol=0, atol=1e-12)
    singles = phase_decomposition(traces, {0: labels}, grouped=False).sel(step=0)
    of_a = [f"val:{j}" for j in (0, 2, 4)]
    pairs = [(i, j) for i in ("0", "1") for j in of_a if j != f"val:{i}"]
    for part in ("within", "between"):
        expected = np.mean([singles[part].sel(train=i, query=j) for i, j in pairs], axis=0)
        np.testing.assert_allclose(got[part].sel(step=0, train="a", query="val:a"), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        got["mean_train"].sel(step=0, train="a"), singles["mean_train"].sel(train=["0", "1"]).mean("train"), rtol=1e-12
    )


def test_labels_of_failed_chains_are_ignored():
    train, query, labels = losses(4), losses(3), draw_phases(0.5, 0.5)
    expected = phase_decomposition(Traces({0: tree(train[1:], {"val": query[1:]})}), {0: labels[1:]})
    labels[0] = "during"
    train[0] = np.nan
    got = phase_decomposition(Traces({0: tree(train, {"val": query}, failed=(0,))}), {0: labels})
    for name in PARTS:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-14)


def test_the_result_says_what_it_is():
    got = phase_decomposition(Traces({0: tree(losses(4), {"val": losses(3)}, window=9)}), {0: draw_phases(0.5, 0.5)})
    assert got["within"].dims == ("step", "phase", "train", "query")
    assert got["between"].dims == ("step", "train", "query")
    assert got["within"].attrs["units"] == got["total_stderr"].attrs["units"] == "nats per unit weight"
    assert (got["weight"].attrs["units"], got["mean_query"].attrs["units"]) == ("1", "nats")
    assert got.attrs["sign"].startswith("negative = helpful")
    assert (got.attrs["window"], json.loads(got.attrs["omitted"])) == (9, {})


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({}, r"got no labels, expected labels of some of the sampled steps \[0\]"),
        ({0: np.zeros(16), 3: np.zeros(16)}, r"got labels of steps \[3\]"),
        ({0: np.zeros(15)}, r"phases\[0\]: expected labels of shape \(16,\) or \(16, 20\), got \(15,\)"),
        ({0: np.zeros((20, 16))}, r"got \(20, 16\)"),
        ({0: "before"}, r"got \(\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_what_would(phases, message):
    with pytest.raises(ValueError, match=message):
        phase_decomposition(Traces({0: tree(losses(4), {"val": losses(3)})}), phases)


def test_one_chain_is_refused():
    short = tree(losses(4, chains=2), {"val": losses(3, chains=2)}, failed=(1,))
    with pytest.raises(ValueError, match="step 0: 1 chain ended ok, expected two or more"):
        phase_decomposition(Traces({0: short}), {0: np.zeros(2)})


def test_too_many_pairs_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr("stagewise.influence.pairs._KEPT", 16 * 11)
    with pytest.raises(ValueError, match="4 x 3 pairs are too many to decompose; pass train_groups"):
        phase_decomposition(Traces({0: tree(losses(4), {"val": losses(3)})}), {0: draw_phases(0.5, 0.5)}, grouped=False)
