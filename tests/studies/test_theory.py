"""The closed forms, against each other's limits and against trained networks."""

import numpy as np
import pytest
import torch

from stagewise.checkpoint import Checkpoint
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.start import start_at
from stagewise.retraining.training import train
from stagewise.studies.hierarchy.network import FIRST, SECOND, optimizer, task
from stagewise.studies.hierarchy.theory import kernels, response
from stagewise.studies.hierarchy.theory.modes import Modes, aligned_strengths, half_rise, item_losses, mixed_strengths
from stagewise.studies.hierarchy.theory.removal import leave_one_out, subset_losses
from stagewise.studies.hierarchy.theory.tree import KINGDOMS, LOPSIDED, Concept, Items
from stagewise.studies.hierarchy.theory.two_times import binned_influence, influence_density

RATE, STEPS = 0.01, 700
TIMES = RATE * np.arange(STEPS + 1)
ITEMS = Items.of(KINGDOMS)


def trained(items, schedules, **settings):
    """Layers of every run at every step, ``(step, run, ...)``."""
    network, rule = task(items, **settings), optimizer(items, "sgd", RATE)
    start = start_at(network, Checkpoint(0, network.state(), rule))
    vector, state = start.point.vector, start.state(len(schedules))
    steps = [state.params]
    train(start, state, schedules, BatchOrder(len(items.shown)), range(STEPS), lambda _, now: steps.append(now.params))
    named = vector.unflatten(torch.stack(steps).detach())
    return named[FIRST].numpy(), named[SECOND].numpy()


def losses(items, first, second):
    return ((second @ first - items.targets.T) ** 2).sum(-2) / 2


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def initial(items, **settings):
    state = task(items, **settings).state()
    return state[FIRST].numpy(), state[SECOND].numpy()


OFF = ~np.eye(8, dtype=bool)


@pytest.fixture(scope="module", params=["aligned", "random"])
def runs(request):
    """Unchanged, each item left out, each item at weight 1 +- h."""
    h = 1e-4
    weights = [0.0, 1 + h, 1 - h]
    schedules = [Schedule(), *(Schedule.window([p], 0, STEPS, w) for w in weights for p in range(8))]
    first, second = trained(ITEMS, schedules, start=request.param)
    loss = losses(ITEMS, first, second)
    response = (loss[:, 9:17] - loss[:, 17:]) / (2 * h)
    return first[:, 0], second[:, 0], loss[:, :1] - loss[:, 1:9], response


def test_mode_strengths_follow_training_whether_it_starts_aligned_or_not(runs):
    first, second, _, _ = runs
    modes = Modes.of(ITEMS.targets.T)
    measured = np.stack([np.diagonal(modes.u.T @ s @ f @ modes.v) for f, s in zip(first, second, strict=True)])
    predicted = mixed_strengths(modes.s, modes.initial(first[0], second[0]), TIMES)
    for mode in range(8):
        assert correlation(measured[:, mode], predicted[:, mode, mode]) > 0.9995


def test_leaving_items_out_in_closed_form_is_what_retraining_measures(runs):
    first, second, left_out, _ = runs
    predicted = leave_one_out(ITEMS.targets.T, first[0], second[0], TIMES)
    assert correlation(predicted[:, OFF], left_out[:, OFF]) > 0.998
    np.testing.assert_allclose(predicted, left_out, atol=0.06 * np.abs(left_out).max())


def test_first_order_response_is_what_small_changes_of_weight_measure(runs):
    first, second, _, measured = runs
    modes = Modes.of(ITEMS.targets.T)
    predicted = response.first_order_response(modes, modes.initial(first[0], second[0]), TIMES)
    assert correlation(predicted[:, OFF], measured[:, OFF]) > 0.996


def test_any_removed_subset_is_exact_too():
    kept = [0, 1, 4, 6]
    out = [2, 3, 5, 7]
    first, second = trained(ITEMS, [Schedule.window(out, 0, STEPS, 0.0)], width=64, start="random", seed=4)
    measured = losses(ITEMS, first, second)[:, 0]
    predicted = subset_losses(ITEMS.targets.T, first[0, 0], second[0, 0], kept, TIMES)
    assert correlation(predicted[:, kept], measured[:, kept]) > 0.999
    np.testing.assert_allclose(predicted[-1, out], measured[-1, out], rtol=0.02)


def test_mixed_strengths_are_the_logistic_curve_for_aligned_modes_and_solve_their_equation_for_mixed_ones():
    s, a0, t = np.array([3.0, 1.0, 1.0, 0.0]), np.array([1e-3, 2e-3, 1e-4, 1e-2]), np.linspace(0, 5, 11)
    strengths = aligned_strengths(s, a0, t)
    np.testing.assert_allclose(mixed_strengths(s, np.diag(a0), t), strengths[:, :, None] * np.eye(4), atol=1e-14)
    np.testing.assert_allclose(strengths[:, 0], 3 / (1 + (3 / 1e-3 - 1) * np.exp(-6 * t)))
    np.testing.assert_allclose(strengths[:, 3], 1e-2 / (1 + 2e-2 * t))  # a mode without strength fades
    mixed = np.diag(a0) + 5e-5
    h = 1e-5
    before, a, after = mixed_strengths(s, mixed, np.array([1 - h, 1.0, 1 + h]))
    slope = np.diag(s) @ a + a @ np.diag(s) - 2 * a @ a
    np.testing.assert_allclose((after - before) / (2 * h), slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(mixed_strengths(s, mixed, np.zeros(1))[0], mixed)


def test_half_rise_is_where_the_curve_is_at_half_and_never_for_an_empty_mode():
    s, a0 = np.array([2.0, 0.0]), np.array([1e-3, 1e-3])
    times = half_rise(s, a0)
    np.testing.assert_allclose(aligned_strengths(s, a0, times[:1])[0, 0], 1.0)
    assert np.isinf(times[1])


def test_too_narrow_network_is_refused_with_the_reason():
    first, second = initial(ITEMS, width=4)
    with pytest.raises(ValueError, match="hidden unit for each of 8 modes"):
        leave_one_out(ITEMS.targets.T, first, second, TIMES)
    with pytest.raises(ValueError, match="hidden unit for each of 8 modes"):
        task(ITEMS, width=4, start="aligned")


@pytest.mark.parametrize("degenerate", [True, False])
def test_whitened_response_is_the_derivative_of_the_closed_form(degenerate):
    targets = ITEMS.targets.T if degenerate else np.random.default_rng(0).standard_normal((5, 4))
    modes, a0, t, h = Modes.of(targets), 1e-7, np.linspace(0, 6, 40), 1e-4
    first, second = np.sqrt(a0) * modes.v.T, np.sqrt(a0) * modes.u

    def outputs(changed):
        moved = Modes.of(changed)
        return moved.u @ mixed_strengths(moved.s, moved.initial(first, second), t) @ moved.v.T

    measured = []
    for p in range(targets.shape[1]):
        tilt = np.zeros_like(targets)
        tilt[:, p] = targets[:, p]
        up, down = (((outputs(targets + sign * h * tilt) - targets) ** 2).sum(1) / 2 for sign in (1, -1))
        measured.append((up - down) / (2 * h))
    predicted = response.whitened_response(modes, a0, t)
    np.testing.assert_allclose(predicted, np.stack(measured, 1), atol=1e-5 * np.abs(predicted).max())


@pytest.mark.parametrize("tree", [KINGDOMS, LOPSIDED])
def test_influence_in_two_times_sums_to_the_first_order_response_of_the_whole_run(tree):
    modes = Modes.of(Items.of(tree).white_targets())
    a0 = np.full(len(modes.s), 1e-3)
    times = RATE * np.arange(401)
    whole = response.first_order_response(modes, np.diag(a0), times)[50::50]
    parts = binned_influence(modes, a0, times[::50], times[50::50])
    np.testing.assert_allclose(parts.sum(0), whole, rtol=0, atol=1e-5 * abs(whole).max())
    later = np.arange(8)[:, None] > np.arange(8)
    assert not parts[later].any()


def test_influence_of_what_is_shown_right_now_is_minus_the_gradient_kernel():
    modes = Modes.of(ITEMS.white_targets())
    a0 = np.full(8, 1e-3)
    for now in (0.5, 1.5, 3.0):
        kernel = kernels.gradient_kernel(modes, aligned_strengths(modes.s, a0, np.array([now])))[0]
        density = influence_density(modes, a0, np.array([now - 1e-9]), now)[0]
        np.testing.assert_allclose(density, -kernel, rtol=0, atol=1e-6 * abs(kernel).max())


def test_lessons_pass_with_the_transition_they_speed_up_cross_pairs_first():
    modes, level = Modes.of(ITEMS.white_targets()), KINGDOMS.split_level()
    times = np.linspace(0, 6, 31)
    influence = abs(binned_influence(modes, np.full(8, 1e-4), times, times[1:])).max(0)
    cross, cousin, sibling = (influence[:, level == kind].max(1) for kind in (1, 2, 3))
    left = [curve[-1] / curve.max() for curve in (cross, cousin, sibling)]
    assert left[0] < 1e-12 < left[1] < 1e-6 < left[2] < 0.01


def test_gradient_kernel_is_the_product_of_the_networks_gradients(runs):
    first, second, _, _ = runs
    modes = Modes.of(ITEMS.targets.T)
    step = 150  # in the middle of the second transition
    w1, w2 = first[step], second[step]
    residual = ITEMS.targets.T - w2 @ w1
    gradients = np.stack(
        [
            np.concatenate(
                [np.outer(w2.T @ residual[:, p], np.eye(8)[p]).ravel(), np.outer(residual[:, p], w1[:, p]).ravel()]
            )
            for p in range(8)
        ]
    )
    a = mixed_strengths(modes.s, modes.initial(first[0], second[0]), TIMES[step : step + 1])
    predicted = kernels.gradient_kernel(modes, a)[0]
    np.testing.assert_allclose(predicted, gradients @ gradients.T, atol=0.06 * predicted.max())
    np.testing.assert_allclose(kernels.hidden_kernel(modes, a)[0], w1.T @ w1, atol=0.03)


def test_kernels_of_aligned_modes_do_not_depend_on_the_form_of_their_strengths():
    modes = Modes.of(ITEMS.targets.T)
    a = aligned_strengths(modes.s, np.full(8, 1e-4), TIMES)
    full = a[:, :, None] * np.eye(8)
    for function in (kernels.gradient_kernel, kernels.representation_distances, item_losses):
        np.testing.assert_allclose(function(modes, a), function(modes, full), atol=1e-12)


def test_flips_of_the_eight_leaf_tree_come_coarse_to_fine_at_the_known_times():
    modes, t = Modes.of(ITEMS.targets.T), np.linspace(0, 8, 8001)
    kernel = kernels.residual_kernel(modes, aligned_strengths(modes.s, np.full(8, 1e-4), t))
    for query, time in ((6, 1.28), (2, 1.56), (1, 2.41)):  # lily, sparrow, cat, of dog
        flips = t[1:][(kernel[1:, 0, query] < 0) & (kernel[:-1, 0, query] >= 0)]
        assert flips.round(2).tolist() == [time]


def test_curvature_floor_is_the_trace_of_the_product_of_gauss_newton_curvatures():
    rng = np.random.default_rng(1)
    w1, w2 = rng.standard_normal((6, 3)), rng.standard_normal((4, 6))

    def jacobian(p):  # of the outputs of item p by all weights
        by_first = np.einsum("oh,i->ohi", w2, np.eye(3)[p]).reshape(4, -1)
        by_second = np.einsum("oq,h->oqh", np.eye(4), w1[:, p]).reshape(4, -1)
        return np.concatenate([by_first, by_second], 1)

    curvatures = [jacobian(p).T @ jacobian(p) for p in range(3)]
    modes = Modes(np.eye(4)[:, :3], np.ones(3), np.eye(3))
    floor = kernels.curvature_floor(modes, (w1.T @ w1)[None], 4)[0]
    for p, q in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_allclose(floor[p, q], np.trace(curvatures[p] @ curvatures[q]))


def test_more_items_than_features_an_empty_mode_and_a_single_item_have_right_answers():
    # Seven items of three features, two of them alike.
    rng = np.random.default_rng(2)
    targets = rng.standard_normal((3, 7))
    targets[:, 6] = targets[:, 5]
    modes = Modes.of(targets)
    assert (modes.s[3:] == 0).all()
    np.testing.assert_allclose((modes.u * modes.s) @ modes.v.T, targets, atol=1e-12)
    first, second = rng.standard_normal((20, 7)) * 1e-2, rng.standard_normal((3, 20)) * 1e-2
    a = mixed_strengths(modes.s, modes.initial(first, second), np.array([30.0]))
    assert item_losses(modes, a).max() < 1e-3
    assert np.isfinite(leave_one_out(targets, first, second, TIMES)).all()
    alone = Items.of(Concept("only"))
    w1, w2 = initial(alone)
    influence = leave_one_out(alone.targets.T, w1, w2, np.array([0.0, 50.0]))
    np.testing.assert_allclose(influence[:, 0, 0], [0, -0.5], atol=1e-3)
    with pytest.raises(ValueError, match="at least one item"):
        subset_losses(alone.targets.T, w1, w2, [], TIMES)


def test_item_without_neighbours_is_learnt_as_one_mode_and_closed_form_holds_on_a_lopsided_tree():
    items = Items.of(LOPSIDED)
    count = len(items.targets)
    schedules = [Schedule(), *(Schedule.window([p], 0, STEPS, 0.0) for p in range(count))]
    first, second = trained(items, schedules, start="random", seed=1)
    loss = losses(items, first, second)
    measured = loss[:, :1] - loss[:, 1:]
    predicted = leave_one_out(items.targets.T, first[0, 0], second[0, 0], TIMES)
    off = ~np.eye(count, dtype=bool)
    assert correlation(predicted[:, off], measured[:, off]) > 0.996  # twelve items: a coarser step in time
