"""Draws from the window's own Gaussian have the covariance that the optimiser's plain recursion gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian import D, Gaussian, draw, law_errors

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.influence.bif import NoTrustedCheckpointError, bif
from stagewise.influence.llc import llc
from stagewise.influence.trusted import TracesInMemory
from stagewise.sampling import Chains, LocalPosterior, krylov, posterior, sample_block
from stagewise.sampling.curvature import Curvature
from stagewise.sampling.frozen_updates import FrozenUpdates
from stagewise.sampling.metric import clip_factor
from stagewise.sampling.window_gaussian import WindowGaussian
from stagewise.traces.diagnostics import diagnose

WINDOW, N_BETA, YOUNG = 12, 5.0, 3
POSTERIOR = LocalPosterior(window=WINDOW, n_beta=N_BETA)
MANY = Chains("window", chains=1500, draws=8, reflect=False, batching="stacked")
FEW = Chains("window", chains=4, draws=16)
RATES = [0.3, 0.2, 0.05]
RULES = {
    "sgd": Optimizer("sgd", 0.3, batch_size=0),
    "momentum": Optimizer("sgd", 0.1, momentum=0.9, batch_size=0),
    "adam": Optimizer("adam", 0.3, batch_size=0),
    "adamw": Optimizer("adam", 0.3, weight_decay=0.4, decoupled=True, batch_size=0),
    "decay": Optimizer("sgd", 0.3, weight_decay=0.4, batch_size=0),
    "clipped": Optimizer("sgd", 0.3, clip_norm=0.5, batch_size=0),
}


def problem(rule="sgd", coming=(), down=0.0):
    """Quadratic losses a few updates after the beginning of a run."""
    gaussian = Gaussian(down=down)
    moments = {"w": 0.003 * gaussian.checkpoint.second_moment["w"]} if RULES[rule].name == "adam" else {}
    checkpoint = Checkpoint(YOUNG, gaussian.checkpoint.params, RULES[rule], second_moment=moments)
    gaussian.checkpoint = checkpoint.followed_by(coming)
    return gaussian


def response(curvatures, optimizer, coming, clip):
    """Where a held gradient of 1 leads along directions of these curvatures, update by update."""
    adam, rates = optimizer.name == "adam", [*coming, *[coming[-1] if coming else optimizer.learning_rate] * WINDOW]
    b, decay = (optimizer.betas[0] if adam else optimizer.momentum), optimizer.weight_decay
    u = m = np.zeros_like(curvatures)
    for made, rate in enumerate(rates[:WINDOW], start=1):
        slope = clip * (1 - curvatures * u) - decay * (not optimizer.decoupled) * u
        m = b * m + (1 - b if adam else 1) * slope
        u = (1 - rate * decay * optimizer.decoupled) * u + rate / (1 - b ** (YOUNG + made) if adam else 1) * m
    return u


def covariance(gaussian):
    """Of the window's Gaussian in whitened coordinates, by dense eigen-decomposition."""
    point, rule = POSTERIOR.at(gaussian.task, gaussian.checkpoint), gaussian.checkpoint.optimizer
    clip = clip_factor(replace(point, anchor=None, scale=None), rule) if rule.clip_norm else 1.0
    scale = point.scale.numpy()
    values, vectors = np.linalg.eigh(scale[:, None] * gaussian.hessian * scale)
    held = response(values, rule, gaussian.checkpoint.coming_rates, clip)
    flat = response(np.zeros(D), rule, gaussian.checkpoint.coming_rates, clip)
    return vectors * held @ vectors.T / N_BETA, held / flat


CASES = [(rule, (), 0.0) for rule in RULES] + [("momentum", RATES, 0.0), ("sgd", (), 1.0), ("adam", RATES, 3.0)]


@pytest.mark.parametrize(("rule", "coming", "down"), CASES)
def test_draws_and_losses_have_the_covariance_of_the_updates_own_response(rule, coming, down):
    gaussian = problem(rule, coming, down)
    whitened, growth = covariance(gaussian)
    assert growth.min() < 0.9 or growth.max() > 1.5
    assert (growth.max() > 1.2) == (down > 0)
    deviations = law_errors(gaussian, gaussian.law(POSTERIOR, whitened), draw(gaussian, POSTERIOR, MANY))
    assert np.mean(abs(deviations) < 3) >= 0.95


def test_the_law_of_chains_would_be_missed_at_this_many_draws():
    gaussian = problem("momentum")
    deviations = law_errors(gaussian, gaussian.law(POSTERIOR), draw(gaussian, POSTERIOR, MANY))
    assert np.mean(abs(deviations) < 3) < 0.8


def test_a_direction_in_which_updates_overshoot_below_nothing_is_not_drawn():
    """Steps longer than 2 / curvature: an even number of updates ends on the other side."""
    gaussian = problem()
    stiff = Optimizer("sgd", 2.05 / np.linalg.eigvalsh(gaussian.hessian)[-1], batch_size=0)
    gaussian.checkpoint = Checkpoint(YOUNG, gaussian.checkpoint.params, stiff)
    density = POSTERIOR.at(gaussian.task, gaussian.checkpoint)
    vectors = np.linalg.eigh(gaussian.hessian)[1]
    draws = WindowGaussian.of(density).draw(50, density.anchor, torch.Generator().manual_seed(0)).numpy() @ vectors
    held = response(np.linalg.eigvalsh(gaussian.hessian), stiff, (), 1.0)
    assert held[-1] < 0 < held[0]
    assert abs(draws[:, -1]).max() < 1e-3 * draws[:, 0].std()


def test_one_decay_and_one_count_stand_for_those_of_most_parameters():
    density = POSTERIOR.at(problem("adamw").task, problem("adamw").checkpoint)
    updates, curvatures = FrozenUpdates.of(density), torch.linspace(-1, 3, 5).double()
    few = torch.tensor([0.0, 1, 1, 1]).double()
    mixed = replace(updates, decay=few * updates.decay, counts=YOUNG * few)
    torch.testing.assert_close(mixed.along(curvatures), updates.along(curvatures))


# Where it is refused, and where chains are


def test_a_checkpoint_that_chains_refuse_is_answered():
    gaussian = problem(down=1.0)
    chains = sample_block(gaussian.task, gaussian.checkpoint, POSTERIOR, replace(FEW, sampler="underdamped"))
    assert set(chains["chains"]["status"].values) == {"not_localised"}
    tree = sample_block(gaussian.task, gaussian.checkpoint, LocalPosterior(window=WINDOW), FEW)
    diagnosis = diagnose(tree)
    assert diagnosis["verdict"] == "ok", diagnosis["advice"].item()
    assert (tree.attrs["burn_in"], tree.attrs["thinning"], tree.attrs["step_size"]) == (0, 1, None)
    assert bif(TracesInMemory({YOUNG: tree}))["value"].notnull().all()


def test_updates_that_run_away_are_left_out_with_what_to_do():
    gaussian = problem(down=3.0)
    trees = [sample_block(gaussian.task, gaussian.checkpoint, POSTERIOR, FEW, block) for block in (0, 1)]
    assert trees[0].attrs["unusable"] == trees[1].attrs["unusable"]
    with pytest.raises(NoTrustedCheckpointError, match=r"12 updates run away .* use a shorter window"):
        bif(TracesInMemory({YOUNG: trees[0]}))


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_the_limit_is_ten_times_as_far_as_without_curvature_along_any_direction(end):
    """Whatever gradients say: draws go along all directions."""
    sgd = RULES["sgd"]
    sampler = WindowGaussian.of(POSTERIOR.at(problem().task, problem().checkpoint))
    sign = -1 if end == "smallest" else 1
    curvatures = sign * np.linspace(0.1, 10, 100_000)
    growth = abs(response(curvatures, sgd, (), 1.0)) / (WINDOW * 0.3)
    for limit, refused in ((9.9, False), (10.1, True)):
        beyond = float(curvatures[(growth > limit).argmax()])
        ends = {"smallest": -0.1, "largest": 0.1} | {end: beyond}
        assert bool(sampler.refused(WINDOW, Curvature(**ends, softest=torch.ones(D)))) == refused


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        (LocalPosterior(gamma=3.0), r"draws by the updates of a window, got gamma=3.0; use LocalPosterior\(window="),
        (LocalPosterior(window=3, centred=False), "draws about the checkpoint, got centred=False"),
    ],
)
def test_a_posterior_that_it_does_not_know_is_refused(unknown, message):
    with pytest.raises(ValueError, match=message):
        sample_block(problem().task, problem().checkpoint, unknown, FEW)


@pytest.mark.parametrize("setting", ["step_size", "burn_in", "thinning", "batch_size"])
def test_settings_of_chains_are_refused(setting):
    with pytest.raises(ValueError, match=f"draws independently, and has no {setting}; leave that out"):
        Chains("window", **{setting: 1})
    with pytest.raises(ValueError, match="which has \\[\\]"):
        Chains("window", options={"friction": 1.0})


def test_no_learning_coefficient_is_made_of_draws_that_are_of_no_posterior():
    tree = sample_block(problem().task, problem().checkpoint, POSTERIOR, FEW)
    with pytest.raises(ValueError, match="of a posterior, and the draws of sampler='window' are of none"):
        llc(TracesInMemory({YOUNG: tree}), trusted_only=False)


# How it is run


def test_draws_are_independent_and_those_of_a_block_are_its_own():
    gaussian = problem()
    blocks = [
        draw(gaussian, POSTERIOR, replace(MANY, chains=100, seed=seed))["weights"] - gaussian.w for seed in (0, 1)
    ]
    assert (blocks[0] != blocks[1]).all()
    for block in blocks:
        scaled = block / block.std((0, 1))
        assert abs((scaled[:, 1:] * scaled[:, :-1]).mean((0, 1))).max() < 0.15
        assert abs((scaled[1:] * scaled[:-1]).mean((0, 1))).max() < 0.15


def test_draws_of_large_models_one_by_one_and_without_kept_vectors_are_the_same(monkeypatch):
    size = 64  # noise comes in sixteens: that of one draw after another is that of all together
    updates = FrozenUpdates.of(POSTERIOR.at(problem().task, problem().checkpoint))
    curvatures, zeros = torch.linspace(-0.3, 3, size).double(), torch.zeros(size).double()
    alike = replace(updates, pull=zeros, decay=zeros, counts=zeros + torch.inf)
    sampler = WindowGaussian(lambda v: curvatures * v, alike, n_beta=2.0)
    together = sampler.draw(3, zeros, torch.Generator().manual_seed(0))
    monkeypatch.setattr(krylov, "STORED", 0)
    noise = torch.Generator().manual_seed(0)
    apart = torch.cat([sampler.draw(1, zeros, noise) for _ in range(3)])
    assert (apart - together).norm() < 2e-3 * together.norm()
    expected = response(curvatures.numpy(), RULES["sgd"], (), 1.0) / 2
    draws = sampler.draw(4000, zeros, noise).numpy()
    np.testing.assert_allclose((draws**2).mean(0), expected, rtol=0.15)


@pytest.mark.parametrize(("per_sample", "raised"), [(10.0, False), (0.01, True)])
def test_n_beta_is_raised_where_second_order_is_large(per_sample, raised, monkeypatch):
    monkeypatch.setattr(posterior, "DEFAULT_N_BETA_PER_SAMPLE", per_sample)
    gaussian = problem()
    tree = sample_block(gaussian.task, gaussian.checkpoint, LocalPosterior(window=WINDOW), FEW)
    facts = tree.attrs
    assert (facts["n_beta_raised"] > 1) == raised
    assert facts["n_beta"] == facts["n_beta_raised"] * per_sample * 6
    assert facts["gamma"] / facts["n_beta"] == pytest.approx(1 / (WINDOW * 0.3))
    assert diagnose(tree)["even_share"] < 0.2
