"""The law of every sampler, without Monte Carlo error: read off its own steps, under noise of our choosing."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from gaussian import walk
from scipy.integrate import quad
from scipy.linalg import solve_discrete_lyapunov
from scipy.ndimage import map_coordinates, spline_filter

from stagewise.influence.covariance import mean_and_stderr
from stagewise.sampling import SGLD, RMSpropSGLD, Underdamped
from stagewise.sampling.base import Gradient

D = 4
PRECISION = np.array([[3.0, 1.0, 0.0, 0.5], [1.0, 2.0, 0.3, 0.0], [0.0, 0.3, 1.0, 0.2], [0.5, 0.0, 0.2, 4.0]])
FASTEST = np.linalg.eigvalsh(PRECISION)[-1]


def gaussian_gradient(u):
    gradient = u @ torch.from_numpy(PRECISION)
    return Gradient(gradient, gradient)


def quartic_gradient(u):
    return Gradient(u**3, u**3)


def start(sampler, positions):
    return sampler.init(torch.from_numpy(positions), torch.Generator())


@pytest.fixture
def shaken(monkeypatch):
    """One step of a sampler from each row of coordinates (positions, then momenta if any) under given noise."""

    def step(sampler, state, gradient, coordinates, noise):
        monkeypatch.setattr(torch, "randn", lambda *_args, **_kwargs: torch.tensor(noise))
        parts = np.split(coordinates, coordinates.shape[1] // noise.shape[1], 1)
        fields = dict(zip(("position", "momentum"), map(torch.from_numpy, parts), strict=False))
        moved = sampler.step(state._replace(**fields), gradient, torch.Generator())
        return np.concatenate([getattr(moved, field).numpy() for field in fields], 1)

    return step


def linear_maps(sampler, state, shaken):
    """On a Gaussian, one step is a linear map of the coordinates plus one of the noise: their matrices.

    The images of unit vectors are the columns of both.
    """
    size = D * (2 if isinstance(sampler, Underdamped) else 1)
    step = partial(shaken, sampler, state, gaussian_gradient)
    return step(np.eye(size), np.zeros((size, D))).T, step(np.zeros((D, size)), np.eye(D)).T


def stationary_covariance(sampler, state, shaken):
    """Of the positions, to rounding."""
    forward, shake = linear_maps(sampler, state, shaken)
    return solve_discrete_lyapunov(forward, shake @ shake.T)[:D, :D]


@pytest.mark.parametrize("share", [0.01, 0.4, 0.95])
def test_sgld_variance_is_too_large_by_exactly_the_documented_factor(share, shaken):
    sampler = SGLD(4 * share / FASTEST)
    covariance = stationary_covariance(sampler, start(sampler, np.zeros((1, D))), shaken)
    factor = np.eye(D) - sampler.step_size * PRECISION / 4
    np.testing.assert_allclose(covariance, np.linalg.inv(PRECISION @ factor), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("friction", [0.3, 3.0])
def test_underdamped_positions_have_no_step_size_error_on_a_gaussian(share, friction, shaken):
    sampler = Underdamped(2 * share / FASTEST**0.5, friction)
    covariance = stationary_covariance(sampler, start(sampler, np.zeros((1, D))), shaken)
    np.testing.assert_allclose(covariance, np.linalg.inv(PRECISION), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("step_size", [1e-3, 1e-2])
def test_rmsprop_metric_changes_the_steps_but_not_the_target(step_size, shaken):
    metric = np.array([[0.0, 0.01, 1.0, 100.0]])
    sampler = RMSpropSGLD(step_size)
    state = sampler.freeze(start(sampler, np.zeros((1, D))))._replace(second_moment=torch.from_numpy(metric))
    covariance = stationary_covariance(sampler, state, shaken)
    # Euler's error, first order in the elementwise steps, and nothing else
    steps = np.diag(step_size / (metric[0] ** 0.5 + 0.1))
    exact = np.linalg.inv(PRECISION - PRECISION @ steps @ PRECISION / 4)
    np.testing.assert_allclose(covariance, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sampler", [SGLD, RMSpropSGLD, Underdamped])
def test_relaxation_counts_the_steps_in_which_the_slowest_direction_forgets(sampler, shaken):
    slowest = np.linalg.eigvalsh(PRECISION)[0]
    tuned = sampler.tuned(slowest, FASTEST)
    state = tuned.freeze(start(tuned, np.zeros((1, D))))  # RMSprop with V at 0, the case it is tuned for
    forward, _ = linear_maps(tuned, state, shaken)
    slowest_mode = abs(np.linalg.eigvals(forward)).max()
    assert -tuned.relaxation(slowest) * np.log(slowest_mode) == pytest.approx(1, abs=0.15)


def quartic_second_moment(sampler, shaken, size=61, width=4.0):
    """Limit of E[u^2] after many steps from anywhere: u^2 averaged backwards over steps on a grid of states."""
    axis = np.linspace(-width, width, size)
    momenta = isinstance(sampler, Underdamped)
    grid = np.stack(np.meshgrid(*[axis] * (2 if momenta else 1), indexing="ij"), -1)
    states = grid.reshape(-1, grid.shape[-1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    step = partial(shaken, sampler, start(sampler, states[:, :1]), quartic_gradient, states)
    images = [(step(np.full((len(states), 1), node)).T + width) / (axis[1] - axis[0]) for node in nodes]
    values = grid[..., 0] ** 2
    for _ in range(int(6 * sampler.relaxation(1.0))):
        spline = spline_filter(values, mode="nearest")
        after = [map_coordinates(spline, image, prefilter=False, mode="nearest") for image in images]
        values = np.average(after, axis=0, weights=weights).reshape(grid.shape[:-1])
    centre = values[(slice(size // 3, -size // 3),) * values.ndim]
    assert np.ptp(centre) < 1e-5  # the start is forgotten
    return centre.mean()


@pytest.mark.parametrize(
    ("coarse", "fine", "order"),
    [(SGLD(0.1), SGLD(0.05), 1), (Underdamped(0.4, 1.0), Underdamped(0.2, 1.0), 2)],
)
def test_step_size_error_on_a_quartic_shrinks_at_the_order_of_the_sampler(coarse, fine, order, shaken):
    def weighted(power):
        return quad(lambda u: u**power * np.exp(-(u**4) / 4), -8, 8)[0]

    exact = weighted(2) / weighted(0)
    errors = [quartic_second_moment(sampler, shaken) - exact for sampler in (coarse, fine)]
    assert 1e-3 < abs(errors[0]) < 2e-2
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("first", [0, 1])
def test_rmsprop_running_mean_follows_its_formula_and_stops_when_frozen(first, shaken):
    sampler = RMSpropSGLD(1e-3, decay=0.9, start=first)
    random = np.random.default_rng(0)
    position = random.standard_normal((2, D))
    state = start(sampler, position)
    v = np.full((2, D), float(first))
    for count in range(1, 4):
        noise = random.standard_normal((2, D))
        v = 0.9 * v + 0.1 * (position @ PRECISION) ** 2
        eps = 1e-3 / (np.sqrt(v / (1 - 0.9**count)) + 0.1)
        shaken(sampler, state, gaussian_gradient, position, noise)  # sets the noise of the step below
        state = sampler.step(state, gaussian_gradient, torch.Generator())
        position = position - eps / 2 * (position @ PRECISION) + np.sqrt(eps) * noise
        np.testing.assert_allclose(state.second_moment.numpy(), v, rtol=1e-12)
        np.testing.assert_allclose(state.position.numpy(), position, rtol=1e-12)
    frozen = sampler.step(sampler.freeze(state), gaussian_gradient, torch.Generator())
    assert torch.equal(frozen.second_moment, state.second_moment)


@pytest.mark.parametrize("first", [0, 1])
def test_rmsprop_without_burn_in_moves_and_stays_finite(first):
    positions = walk(RMSpropSGLD(1e-3, start=first), gaussian_gradient, 2, 3, burn_in=0, d=D)
    assert np.isfinite(positions).all()
    assert np.ptp(positions, 1).min() > 0


@pytest.mark.parametrize("first", [0, 1])
def test_rmsprop_samples_the_target_after_adapting_from_either_start(first):
    sampler = RMSpropSGLD(0.02, start=first)
    positions = walk(sampler, gaussian_gradient, 2000, 4, burn_in=1000, thinning=100, d=D)
    products = (positions[..., :, None] * positions[..., None, :]).mean(1)
    value, stderr = mean_and_stderr(products)
    assert (abs(value - np.linalg.inv(PRECISION)) < 3 * stderr).all()


def test_noise_is_standard_normal_and_independent_between_steps_and_chains():
    flat = lambda u: Gradient(torch.zeros_like(u), u)  # noqa: E731
    noise = np.diff(walk(SGLD(1.0), flat, 500, 101, burn_in=0, d=D), axis=1)
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5
    for lagged in (noise[1:] * noise[:-1], noise[:, 1:] * noise[:, :-1], noise[..., 1:] * noise[..., :-1]):
        assert abs(lagged.mean()) < 4 / lagged.size**0.5


@pytest.mark.parametrize("scheme", ["sgld", "baoa"])
def test_paths_agree_with_the_library_posteriors_under_the_same_noise(scheme, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from posteriors.sgmcmc import baoa, sgld

    def log_density(u, _batch):
        return -0.5 * (u * gaussian_gradient(u).potential).sum(), torch.tensor([])

    random = torch.Generator().manual_seed(0)
    noise, position, momentum = torch.randn(32, 3, D, generator=random, dtype=torch.float64).split([30, 1, 1])
    position, momentum = position[0], momentum[0]
    if scheme == "sgld":
        ours, theirs = SGLD(0.2), sgld.build(log_density, lr=0.1)
        state, other = ours.init(position, random), theirs.init(position)
    else:
        ours, theirs = Underdamped(0.4, 0.7), baoa.build(log_density, lr=0.4, alpha=0.7)
        state = ours.init(position, random)._replace(momentum=momentum)
        # their whole kick is at the start of a step, ours at its end
        kicked = momentum + 0.4 * gaussian_gradient(position).potential
        other = baoa.init(position, kicked)
    for shock in noise:
        monkeypatch.setattr(torch, "randn", lambda *_a, shock=shock, **_k: shock.clone())
        monkeypatch.setattr(torch, "randn_like", lambda *_a, shock=shock, **_k: shock.clone())
        state = ours.step(state, gaussian_gradient, random)
        other, _ = theirs.update(other, None)
    torch.testing.assert_close(state.position, other.params, rtol=1e-5, atol=1e-6)
