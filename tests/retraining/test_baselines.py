"""TracIn and SOURCE, held against exact unrolling where they are exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import LABELS, D, N, Regression, classifier
from scipy.linalg import expm
from torch import nn

from stagewise.baselines import intervals as intervals_module
from stagewise.baselines import source as source_module
from stagewise.baselines.source import saturation, source
from stagewise.baselines.tracin import tracin
from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.dynamics.curves import curves
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.training import train_and_record
from stagewise.retraining.unrolling import unrolled_influence
from stagewise.task import Task

AWAY = np.array([1.0, -0.5, 2.0, 0.3])


def run(task, optimizer, steps, w=None, order=None):
    if w is not None:
        task.model.weight.data = torch.from_numpy(w)[None]
    return Trajectory.from_checkpoints(
        train_and_record(task, optimizer, order or BatchOrder(len(task.train)), [0, *steps])
    )


def unrolled(task, trajectory, **options):
    return unrolled_influence(task, trajectory.load(0), BatchOrder(len(task.train)), trajectory.steps, **options)


def relative_error(got, expected):
    return (abs(got.value - expected.value).max() / abs(expected.value).max()).item()


@pytest.mark.parametrize(("momentum", "fine"), [(0.0, 4), (0.9, 16)])  # momentum is averaged over many updates
@pytest.mark.parametrize("during", [None, range(6, 14)])
def test_source_at_a_minimum_of_a_quadratic_is_unrolling_up_to_first_order_in_the_learning_rate(momentum, fine, during):
    """Hessian and gradients are constant there, so that only exp(-eta K H) for (I - eta H)^K is left."""
    problem, errors = Regression(), []
    for finer in (fine, 2 * fine):
        stretched = None if during is None else range(during.start * finer, during.stop * finer)
        optimizer = Optimizer("sgd", (1 - momentum) * 0.2 / finer, momentum=momentum)
        trajectory = run(problem.task, optimizer, [10 * finer, 20 * finer], problem.minimiser())
        got = source(problem.task, trajectory, during=stretched, segments=2)
        errors.append(relative_error(got, unrolled(problem.task, trajectory, during=stretched)))
    assert errors[0] < 0.1
    assert 1.8 < errors[0] / errors[1] < 2.5  # order 2 would be a factor of 4


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_source_with_a_segment_per_update_follows_changing_gradients_up_to_first_order(weight_decay):
    problem, errors = Regression(), []
    for finer in (2, 4):
        optimizer = Optimizer("sgd", 0.2 / finer, weight_decay=weight_decay)
        trajectory = run(problem.task, optimizer, range(1, 20 * finer), AWAY)
        got = source(problem.task, trajectory, segments=1000)
        errors.append(relative_error(got, unrolled(problem.task, trajectory)))
    assert errors[0] < 0.1
    assert 1.8 < errors[0] / errors[1] < 2.2


class Bowl(nn.Module):
    """Quadratic losses c_i . w + 1/2 sum_k h_k w_k^2 with sum_i c_i = 0: at w = 0 training stays put."""

    def __init__(self, curvatures):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(curvatures), dtype=torch.float64))
        self.h = torch.tensor(curvatures, dtype=torch.float64)

    def forward(self, c):
        return c @ self.w + 0.5 * (self.h * self.w**2).sum()


def bowl(curvatures):
    c = torch.randn(6, len(curvatures), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c -= c.mean(0)
    task = Task(Bowl(curvatures), lambda model, batch: model(batch[0]), train=(c,), queries={"q": (c[:1],)})
    return task, c.numpy()


def test_positive_zero_and_negative_curvature_respond_by_decay_drift_and_growth():
    h, rate, steps = np.array([2.0, 0.0, -3.0, 1e-12]), 0.01, [100, 300]
    task, c = bowl(h.tolist())
    got = source(task, run(task, Optimizer("sgd", rate), steps), segments=1)
    for step in steps:
        time = rate * step
        response = np.array([(1 - np.exp(-2 * time)) / 2, time, (np.exp(3 * time) - 1) / 3, time])
        expected = -(c * response) @ c[0] / 6
        np.testing.assert_allclose(got.value.sel(step=step)[:, 0], expected, rtol=1e-9)


def test_the_filter_is_right_on_both_sides_of_zero_and_finite_for_growth():
    x = np.array([-600.0, -1.0, -1e-9, 0.0, 1e-9, 1.0, 1e6])
    expected = [np.expm1(600) / 600, np.expm1(1), 1 + 5e-10, 1, 1 - 5e-10, -np.expm1(-1), 1e-6]
    np.testing.assert_allclose(saturation(x), expected, rtol=1e-12)


def test_without_curvature_source_is_tracin_at_unequal_intervals_rates_and_in_windows():
    task, _ = bowl([0.0, 0.0])
    (start,) = train_and_record(task, Optimizer("sgd", 0.1), BatchOrder(6), [0])
    rates = {0: 0.1, 3: 0.05, 10: 0.2, 11: 0.01}
    trajectory = Trajectory.from_checkpoints(
        Checkpoint(step, start.params, Optimizer("sgd", rate)) for step, rate in rates.items()
    )
    for during in (None, range(2, 6), range(10, 50)):
        sums, products = source(task, trajectory, segments=2, during=during), tracin(task, trajectory, during=during)
        np.testing.assert_allclose(sums.value, products.value, rtol=1e-10, atol=1e-16)
    whole = tracin(task, trajectory).value
    np.testing.assert_allclose(whole[1:] / whole[1], np.array([0.3, 0.65, 0.85])[:, None, None] / 0.3 + 0 * whole[1:])


@pytest.mark.parametrize("estimator", [tracin, source])
@pytest.mark.parametrize("during", [None, range(2, 5)])
def test_a_short_run_is_unrolling(estimator, during):
    task = classifier()
    trajectory = run(task, Optimizer("sgd", 1e-5), range(1, 7))
    got, expected = estimator(task, trajectory, during=during), unrolled(task, trajectory, during=during)
    assert relative_error(got, expected) < 1e-4
    assert not got.value[0].values.any()


def test_source_beats_tracin_on_a_long_run_because_it_carries_influence_through_later_training():
    task = classifier()
    trajectory = run(task, Optimizer("sgd", 0.3), range(2, 81, 2))
    exact = unrolled(task, trajectory)
    errors = [relative_error(estimator(task, trajectory), exact) for estimator in (source, tracin)]
    assert errors[0] < 0.1 < 1 < errors[1]


@pytest.mark.parametrize("estimator", [tracin, source])
def test_the_value_of_a_group_is_the_mean_over_its_samples(estimator):
    problem = Regression()
    trajectory = run(problem.task, Optimizer("sgd", 0.1), [10, 20], AWAY)
    groups = estimator(problem.task, trajectory, groups=LABELS)
    single = estimator(problem.task, trajectory, groups=range(N))
    expected = np.stack([single.value.values[:, label == LABELS].mean(1) for label in "abc"], 1)
    np.testing.assert_allclose(groups.value, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", [tracin, source])
def test_training_on_a_class_helps_it_and_the_result_is_accepted_as_a_curve(estimator):
    task = classifier()
    got = estimator(task, run(task, Optimizer("sgd", 0.1), [5, 10]))
    assert got.value.dims == ("step", "train", "query")
    assert (np.diagonal(got.value.sel(step=10)) < 0).all()
    assert got.train_size.values.tolist() == [20, 20, 20]
    assert got.attrs["units"] == "nats per unit weight"
    assert got.attrs["sign"].startswith("negative = helpful")
    curves(got)


def test_a_training_set_larger_than_a_forward_pass_gives_the_same():
    task, optimizer = classifier(), Optimizer("sgd", 0.1)
    trajectory = run(task, optimizer, [5, 10])
    whole = [estimator(task, trajectory).value for estimator in (tracin, source)]
    task.forward_batch = 7
    for estimator, expected in zip((tracin, source), whole, strict=True):
        np.testing.assert_allclose(estimator(task, trajectory).value, expected, rtol=1e-9)


@pytest.mark.parametrize("estimator", [tracin, source])
def test_adam_unknown_optimizers_and_other_models_are_refused(estimator):
    problem = Regression()
    adam = run(problem.task, Optimizer("adam", 0.1), [5], AWAY)
    with pytest.raises(ValueError, match=r"trained with adam.*use unrolled_influence"):
        estimator(problem.task, adam)
    bare = Trajectory.from_checkpoints([Checkpoint(3, adam.load(5).params)])
    with pytest.raises(ValueError, match="does not say which optimizer"):
        estimator(problem.task, bare)
    with pytest.raises(ValueError, match="shape"):
        estimator(problem.task, problem.trajectory(np.zeros(D + 1)))
    with pytest.raises(ValueError, match="range of consecutive updates"):
        estimator(problem.task, problem.trajectory(AWAY), during=range(3, 3))
    with pytest.raises(ValueError, match="no checkpoints"):
        estimator(problem.task, Trajectory.from_checkpoints([]))


def test_a_hessian_that_is_too_large_and_no_segments_are_refused(monkeypatch):
    problem = Regression()
    with pytest.raises(ValueError, match="segments must be at least 1"):
        source(problem.task, problem.trajectory(AWAY), segments=0)
    monkeypatch.setattr(source_module, "_LARGEST_DENSE", 3)
    with pytest.raises(ValueError, match=r"dense 4 x 4 .*at most 3 .*use unrolled_influence or tracin"):
        source(problem.task, problem.trajectory(AWAY))


@pytest.mark.parametrize("estimator", [tracin, source])
def test_a_window_without_any_update_between_the_checkpoints_is_refused_and_not_answered_with_zeros(estimator):
    problem = Regression()
    trajectory = run(problem.task, Optimizer("sgd", 0.1), [10, 20], AWAY)
    later = Trajectory(trajectory.steps[1:], trajectory.load)
    for during in (range(3, 10), range(20, 30)):
        with pytest.raises(ValueError, match="lies outside the updates from step 10 to step 20"):
            estimator(problem.task, later, during=during)
    for during in (range(3, 11), range(19, 30)):
        assert estimator(problem.task, later, during=during).value.values.any()


def test_more_hessians_than_fit_the_memory_are_refused_before_any_is_made(monkeypatch):
    model = nn.Linear(4000, 1, bias=False).double()
    x = torch.ones(4, 4000, dtype=torch.float64)
    task = Task(model, lambda model, batch: model(batch[0])[:, 0], train=(x,), queries={"q": (x,)})
    rule, made = Optimizer("sgd", 0.1, batch_size=0), []

    def load(step):
        return Checkpoint(step, task.state(), rule)

    def dense(product, like):
        made.append(like)
        raise MemoryError

    monkeypatch.setattr(intervals_module, "dense", dense)
    with pytest.raises(ValueError, match=r"of 80 checkpoints, 9.54 GiB, and at most 8 GiB .* fewer checkpoints"):
        source(task, Trajectory(tuple(range(80)), load))
    assert not made
    with pytest.raises(MemoryError):
        source(task, Trajectory(tuple(range(60)), load))


class Halves(nn.Module):
    """Linear regression whose weights are two parameters, so that they can have learning rates of their own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return x @ torch.cat([self.left, self.right])


def halves(w):
    problem, model = Regression(), Halves()
    model.left.data, model.right.data = (torch.from_numpy(part.copy()) for part in np.split(w, 2))
    data = [tuple(map(torch.from_numpy, pair)) for pair in ((problem.x, problem.y), (problem.xq, problem.yq))]

    def loss(model, batch):
        return 0.5 * (model(batch[0]) - batch[1]) ** 2

    return problem, Task(
        model,
        loss,
        train=data[0],
        queries={"val": data[1]},
        train_groups=LABELS,
        query_groups={"val": list("aaabbbccc")},
    )


def in_groups(rate, left, right, **options):
    """The rate of a run, and that of its halves in units of it; None: not updated."""
    parts = (("left", left), ("right", right))
    groups = tuple(ParameterGroup((name,), rate * part) for name, part in parts if part is not None)
    return Optimizer("sgd", rate, groups=groups, **options)


SPLIT = {"own rates": (1.0, 0.2), "one at rest": (1.0, 0.0), "one not updated": (None, 1.0)}


@pytest.mark.parametrize("estimator", [tracin, source])
@pytest.mark.parametrize("split", SPLIT)
def test_groups_move_at_their_own_rates_and_what_is_not_updated_does_not(estimator, split):
    _, task = halves(AWAY)
    trajectory = run(task, in_groups(1e-5, *SPLIT[split]), range(1, 7))
    assert relative_error(estimator(task, trajectory), unrolled(task, trajectory)) < 1e-4


@pytest.mark.parametrize("split", SPLIT)
@pytest.mark.parametrize("during", [None, range(6, 14)])
def test_source_carries_responses_through_coupled_groups_of_different_rates(split, during):
    """At the minimum of a quadratic the response obeys  r' = -M H r - M g / n  with M the groups' rates."""
    problem, rate = Regression(), 0.2
    w = problem.minimiser()
    _, task = halves(w)
    rule = in_groups(rate, *SPLIT[split], batch_size=0)
    at = Trajectory.from_checkpoints(Checkpoint(step, task.state(), rule) for step in (0, 10, 20))
    got = source(task, at, during=during, segments=2).value
    rates = rate * np.repeat([part or 0.0 for part in SPLIT[split]], 2)
    decay = rates[:, None] * (problem.x.T @ problem.x / N)
    samples = problem.x * (problem.x @ w - problem.y)[:, None]
    drive = np.stack([samples[label == LABELS].mean(0) for label in "abc"]) * rates / N
    queries = (problem.xq * (problem.xq @ w - problem.yq)[:, None]).reshape(3, 3, D).mean(1)
    response = np.zeros_like(drive)
    varied = during or range(20)
    for segment in (range(10), range(10, 20)):
        inside = range(max(segment.start, varied.start), min(segment.stop, varied.stop))
        response = response @ expm(-decay * len(segment)).T
        pushed = -drive @ integral(decay, len(inside)).T
        response += pushed @ expm(-decay * (segment.stop - inside.stop)).T
        np.testing.assert_allclose(got.sel(step=segment.stop), response @ queries.T, rtol=1e-8, atol=1e-14)


def integral(matrix, time):
    """Of exp(-s matrix) over 0 < s < time."""
    size = len(matrix)
    block = np.zeros((2 * size, 2 * size))
    block[:size] = np.hstack([-matrix, np.eye(size)])
    return expm(block * time)[:size, size:]


def test_weight_decay_of_a_group_bends_its_own_directions_only():
    _, task = halves(AWAY)
    groups = (ParameterGroup(("left",), 0.01, 0.5), ParameterGroup(("right",), 0.01, 0.0))
    trajectory = run(task, Optimizer("sgd", 0.01, groups=groups), range(1, 40))
    assert relative_error(source(task, trajectory, segments=1000), unrolled(task, trajectory)) < 0.02
    bare = run(task, Optimizer("sgd", 0.01), range(1, 40))
    assert relative_error(source(task, bare, segments=1000), unrolled(task, trajectory)) > 0.03


@pytest.mark.parametrize("estimator", [tracin, source])
def test_a_layer_that_is_unfrozen_between_checkpoints_counts_from_then_on(estimator):
    _, task = halves(AWAY)
    rule = {0: in_groups(1e-5, 1.0, None), 4: in_groups(1e-5, 1.0, 1.0), 8: in_groups(1e-5, 1.0, 1.0)}
    at = [Checkpoint(step, task.state(), optimizer) for step, optimizer in rule.items()]
    got = estimator(task, Trajectory.from_checkpoints(at)).value
    head, both = (
        estimator(task, Trajectory.from_checkpoints([replace(at[k], step=s) for s in (0, 4)])).value[1] for k in (0, 1)
    )
    np.testing.assert_allclose(got[1], head, rtol=1e-9)
    np.testing.assert_allclose(got[2], head + both, rtol=1e-3)


@pytest.mark.parametrize("estimator", [tracin, source])
def test_gradients_that_were_clipped_count_for_the_length_they_had(estimator):
    problem = Regression()
    problem.task.model.weight.data = torch.from_numpy(AWAY)[None]
    free, clipped = (
        Trajectory.from_checkpoints(
            Checkpoint(step, problem.task.state(), Optimizer("sgd", 1e-6, batch_size=0, clip_norm=norm))
            for step in (0, 3)
        )
        for norm in (None, 0.25)
    )
    length = np.linalg.norm(problem.x.T @ (problem.x @ AWAY - problem.y) / N)
    assert length > 0.5
    expected = estimator(problem.task, free).value * 0.25 / length
    np.testing.assert_allclose(estimator(problem.task, clipped).value, expected, rtol=1e-4)
