import json

import numpy as np
import pytest
import xarray as xr
from regression import Regression
from scipy import stats
from synthetic_traces import Traces, losses, tree

from stagewise.influence.bif import bif
from stagewise.influence.llc import llc
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior

N_BETA, GAMMA, H = 50.0, 3.0, np.array([2.0, 0.3, 0.01, 0.0])
EXACT = 0.5 * (N_BETA * H / (N_BETA * H + GAMMA)).sum()
AT_CHECKPOINT = np.array([1.0, 3.0, 0.5])
SHARES = np.array([0.5, 1.0, 1.5])  # the samples' curvatures are these times H, whose mean is H


@pytest.fixture
def trusting(monkeypatch):
    """Every checkpoint is fine, without the cost of finding out."""
    verdict = xr.Dataset({"verdict": "ok", "advice": ""})
    monkeypatch.setattr("stagewise.influence.trusted.diagnose", lambda *_: verdict)


def bowl(positions, slope=0.0, **arguments):
    """A cell of quadratic losses at displacements (chain, draw, direction) from the checkpoint."""
    rise = 0.5 * positions**2 @ H + slope * positions.sum(-1)
    loss = AT_CHECKPOINT + SHARES * rise[..., None]
    cell = tree(loss, {"val": loss}, kappa=N_BETA / 10, **arguments)
    train = cell["train"].to_dataset()
    cell["train"] = train.assign(loss_anchor=("sample", AT_CHECKPOINT))
    return cell


def gaussian(chains=16, draws=64, memory=0.0, seed=0):
    """Draws of the local posterior, with autocorrelation ``memory`` from one to the next."""
    noise = np.random.default_rng(seed).normal(size=(chains, draws, len(H)))
    for t in range(1, draws):
        noise[:, t] = memory * noise[:, t - 1] + np.sqrt(1 - memory**2) * noise[:, t]
    return noise / np.sqrt(N_BETA * H + GAMMA)


@pytest.mark.parametrize("slope", [0.0, 0.02])
def test_gaussian_posterior_has_half_the_number_of_directions_that_the_data_hold(slope):
    got = llc(Traces({5: bowl(gaussian(draws=2000), slope)}))
    assert got["value"].dims == ("step",)
    assert np.abs(got["value"] - EXACT).item() < 4 * got["stderr"].item()
    assert got["stderr"].item() < 0.02 * EXACT  # tight enough to notice a wrong factor


def test_even_part_has_no_noise_of_the_slope_and_estimates_the_same():
    problem = Regression.random(n=12)
    posterior = LocalPosterior(gamma=20.0, n_beta=60.0)
    cell = sample_block(problem.task, problem.trajectory().load(10), posterior, Chains(chains=32, draws=64))
    curvature = 60.0 * np.linalg.eigvalsh(problem.hessian)
    exact = 0.5 * (curvature / (curvature + 20.0)).sum()
    full, even = (llc(Traces({10: cell}), part=part) for part in ("full", "even"))
    assert even["stderr"].item() < full["stderr"].item() / 3
    assert np.abs(even["value"] - exact).item() < 4 * even["stderr"].item()


def test_even_part_is_refused_where_it_would_be_of_another_law_or_cannot_be_formed():
    problem = Regression.random(n=12)
    checkpoint = problem.trajectory().load(10)
    downhill = sample_block(problem.task, checkpoint, LocalPosterior(gamma=20.0, centred=False), Chains(draws=32))
    with pytest.raises(ValueError, match="needs a centred posterior"):
        llc(Traces({10: downhill}), part="even")
    once = sample_block(problem.task, checkpoint, LocalPosterior(gamma=20.0), Chains(draws=32, reflect=False))
    with pytest.raises(ValueError, match="reflect=True"):
        llc(Traces({10: once}), part="even")
    with pytest.raises(ValueError, match="'full' or 'even', got 'odd'"):
        llc(Traces({10: once}), part="odd")


@pytest.mark.parametrize("centred", [True, False])
def test_real_chains_on_a_slope_count_curvature_if_centred_and_otherwise_also_the_loss_gained_downhill(centred):
    problem = Regression.random(n=12)
    posterior = LocalPosterior(gamma=20.0, n_beta=60.0, centred=centred)
    sampling = Chains(chains=64, draws=128, reflect=False)
    cell = sample_block(problem.task, problem.trajectory().load(10), posterior, sampling)
    curvature = 60.0 * np.linalg.eigvalsh(problem.hessian)
    exact = 0.5 * (curvature / (curvature + 20.0)).sum()
    if not centred:
        centre, _ = problem.posterior(60.0 / 12, 20.0, np.ones(12))
        exact += 60.0 * (problem.losses(centre) - problem.losses(problem.w)).mean()
        assert exact < 0
    got = llc(Traces({10: cell}))
    assert np.abs(got["value"] - exact).item() < 4 * got["stderr"].item()
    assert got["stderr"].item() < 0.15 * np.abs(exact)


@pytest.mark.parametrize(("chains", "memory"), [(16, 0.0), (16, 0.8), (4, 0.0)])
def test_t_interval_covers_the_exact_value_as_often_as_it_says(trusting, chains, memory):
    cells = {seed: bowl(gaussian(chains, 64, memory, seed)) for seed in range(200)}
    got = llc(Traces(cells))
    reach = stats.t.ppf(0.95, got.sizes["replicate"] - 1) * got["stderr"]
    covered = int((np.abs(got["value"] - EXACT) < reach).sum())
    # Stretches of few chains and skewed losses cost a little: 0.85 instead of 0.9.
    assert stats.binomtest(covered, 200, 0.85, alternative="less").pvalue > 1e-2
    assert stats.binomtest(covered, 200, 0.9, alternative="greater").pvalue > 1e-3


def test_flat_loss_has_coefficient_zero_without_doubt(trusting):
    got = llc(Traces({5: bowl(np.zeros((4, 16, len(H))))}))
    assert (got["value"].item(), got["stderr"].item()) == (0, 0)


def test_small_rise_of_a_large_loss_survives_float32(trusting):
    anchor = np.random.default_rng(0).uniform(100, 1000, 1000).astype(np.float32)
    loss = np.broadcast_to(np.nextafter(anchor, np.float32(2000)), (4, 16, 1000))
    cell = tree(loss, {"val": loss})
    cell["train"] = cell["train"].to_dataset().assign(loss_anchor=("sample", anchor))
    exact = 20 * np.spacing(anchor).mean(dtype=float)
    assert llc(Traces({5: cell}))["value"].item() == pytest.approx(exact, rel=1e-9)


def test_few_chains_are_cut_into_stretches_as_by_bif_without_the_draws_that_fill_none(trusting):
    cell = bowl(gaussian(chains=5, draws=22))
    got = llc(Traces({5: cell})).sel(step=5)
    rises = N_BETA * (cell["train"]["loss"].values - AT_CHECKPOINT).mean(-1)
    np.testing.assert_allclose(got["replicates"], rises[:, 2:].reshape(20, 5).mean(1), rtol=1e-12)
    assert got["value"].item() == pytest.approx(rises[:, 2:].mean(), rel=1e-12)
    assert got["replicate"].values.tolist() == bif(Traces({5: cell}))["replicate"].values.tolist()


def test_tokens_are_averaged_like_the_training_loss(trusting):
    loss = losses(5, 3)
    cell = tree(loss, {"val": loss})
    anchor = np.random.default_rng(1).normal(size=(5, 3))
    cell["train"] = cell["train"].to_dataset().assign(loss_anchor=(("sample", "token"), anchor))
    got = llc(Traces({5: cell}))["value"].item()
    assert got == pytest.approx(20 * (loss.mean() - anchor.mean()), rel=1e-12)


def test_failed_chains_leave_no_trace_and_replicates_are_the_chains_in_common(trusting):
    broken = bowl(gaussian(seed=1), failed=(3,))
    broken["train"]["loss"].values[3] = np.nan
    traces = Traces({1: broken, 2: bowl(gaussian(seed=2))})
    got = llc(traces)
    assert got["replicates"].dims == ("step", "replicate")
    assert got["replicate"].values.tolist() == [c for c in range(16) if c != 3]
    assert got["replicate"].equals(bif(traces)["replicate"])
    assert np.isfinite(got["value"]).all()
    own = (bowl(gaussian(seed=2))["train"]["loss"].values - AT_CHECKPOINT).mean((1, 2))
    np.testing.assert_allclose(got["replicates"].sel(step=2), N_BETA * np.delete(own, 3), rtol=1e-12)


def test_the_result_says_what_it_is_and_what_it_leaves_out():
    lost = bowl(gaussian(seed=1), failed=range(12))
    got = llc(Traces({1: lost, 2: bowl(gaussian(seed=2), window=30)}))
    assert got["step"].values.tolist() == [2]
    assert "12 of 16 chains failed" in json.loads(got.attrs["omitted"])["1"]
    assert (got.attrs["estimator"], got.attrs["units"], got.attrs["n_beta"]) == ("llc", "1", N_BETA)
    assert got.attrs["window"] == 30
    assert llc(Traces({1: lost}), trusted_only=False)["step"].values.tolist() == [1]
    with pytest.raises(ValueError, match="step 1: chains failed"):
        llc(Traces({1: lost}))
