"""What comes in through the doors of this room: weights, queries, candidates, models, bad checkpoints, folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import classifier
from torch import nn

from stagewise.baselines.source import source
from stagewise.baselines.tracin import tracin
from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.directory import write_checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.leave_out import leave_out, retrain
from stagewise.retraining.replay import replay
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.start import start_at
from stagewise.retraining.training import train, train_and_record
from stagewise.retraining.two_times import influence_in_time
from stagewise.retraining.unrolling import unroll, unrolled_influence
from stagewise.retraining.window_influence import window_influence
from stagewise.stacking import decided
from stagewise.task import Task

SGD = Optimizer("sgd", 0.2, batch_size=0)
N = 12


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def points(n=N, seed=0, dtype=torch.float64):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype), torch.arange(n) % 3


def linear(seed=0, dtype=torch.float64):
    model = nn.Linear(4, 3, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def alone(*checkpoints):
    return Trajectory.from_checkpoints(checkpoints)


CALLS = {
    "window_ablation": lambda task, start, order: window_ablation(task, alone(start), window=4, order=order).effect,
    "leave_out": lambda task, start, order: leave_out(task, start, order, [4], weight=0.8).effect,
    "unrolled_influence": lambda task, start, order: unrolled_influence(task, start, order, [4]).value,
    "window_influence": lambda task, start, order: (
        window_influence(task, alone(start), window=4, order=order, mode="reverse").value
    ),
    "influence_in_time": lambda task, start, order: influence_in_time(task, start, order, [4]).value[0],
    "tracin": lambda task, start, _: tracin(task, alone(start, replace(start, step=4))).value[1:],
    "source": lambda task, start, _: source(task, alone(start, replace(start, step=4))).value[1:],
}


# Tokens with weights: what a sample weighs in the objective.


def tokens(objective, weights):
    """Three predictions per sample; the loss returns the weights of their tokens."""
    model = nn.Linear(4, 9, dtype=torch.float64)
    model.load_state_dict({"weight": linear(1).weight.data.repeat(3, 1), "bias": linear(2).bias.data.repeat(3)})
    x, _ = points()
    y = torch.randint(3, (N, 3), generator=torch.Generator().manual_seed(3))

    def loss(model, batch):
        x, y, w = batch
        return nn.functional.cross_entropy(model(x).reshape(-1, 3, 3).mT, y, reduction="none"), w

    data = (x, y, weights)
    return Task(model, loss, train=data, queries={"q": data}, train_groups=[0] * 4 + [1] * 8, objective=objective)


@pytest.mark.parametrize("objective", ["samples", "tokens"])
@pytest.mark.parametrize("batching", ["stacked", "loop"])
def test_an_update_follows_the_weighted_mean_of_its_own_batch_and_queries_the_weighted_mean_of_theirs(
    objective, batching
):
    weights = (torch.rand(N, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64) > 0.4).double() * 2
    weights[2] = 0  # a sample that is all padding
    task, order = tokens(objective, weights), BatchOrder(N, 5, seed=1)
    start = Checkpoint(0, task.state(), replace(SGD, batch_size=5))
    got = retrain(
        task, start, [Schedule(), Schedule.whole_run(range(4), 0.3)], order, [3], batching=batching
    ).values[0, :, 0]  # fmt: skip

    def weighted(model, index, beta):
        x, y, w = task.train.batch(index)
        losses = nn.functional.cross_entropy(model(x).reshape(-1, 3, 3).mT, y, reduction="none")
        if objective == "samples":
            w = w / w.sum(1, keepdim=True).clamp(min=1e-30)
        return (beta[index][:, None] * w * losses).sum() / w.sum()

    for row, beta in enumerate((1.0, 0.3)):
        model = nn.Linear(4, 9, dtype=torch.float64)
        model.load_state_dict(task.state())
        sgd = torch.optim.SGD(model.parameters(), lr=0.2)
        changed = torch.ones(N, dtype=torch.float64)
        changed[:4] = beta
        for step in range(3):
            sgd.zero_grad()
            weighted(model, order(step), changed).backward()
            sgd.step()
        expected = weighted(model, torch.arange(N), torch.ones(N, dtype=torch.float64)).item()
        np.testing.assert_allclose(got[row], expected, rtol=1e-10)


@pytest.mark.parametrize("objective", ["samples", "tokens"])
@pytest.mark.parametrize("call", ["unrolled_influence", "tracin", "source"])
def test_the_influence_of_weighted_samples_is_the_derivative_of_retraining(call, objective):
    weights = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]] * 3).double()
    task = tokens(objective, weights)
    start = Checkpoint(0, task.state(), replace(SGD, learning_rate=1e-6))
    got = CALLS[call](task, start, BatchOrder(N)).values[0, :, 0]
    up, down = (leave_out(task, start, BatchOrder(N), [4], weight=w).effect.values[0, :, 0] for w in (1.01, 0.99))
    np.testing.assert_allclose(got, (up - down) / 0.02 / [4, 8], rtol=1e-4)


def test_a_query_set_with_a_loss_of_its_own_is_measured_by_it():
    def margin(model, batch):
        scores = model(batch[0])
        return scores.gather(1, batch[1][:, None])[:, 0] - scores.mean(1)

    x, y = points()
    task = Task(
        linear(), cross_entropy, train=(x, y), queries={"loss": (x, y), "margin": (x, y)},
        query_losses={"margin": margin}, train_groups=y,
    )  # fmt: skip
    start, order = Checkpoint(0, task.state(), SGD), BatchOrder(N)
    losses = retrain(task, start, [Schedule()], order, [0])
    with torch.no_grad():
        np.testing.assert_allclose(losses.sel(query="margin").item(), margin(task.model, (x, y)).mean(), rtol=1e-12)
        np.testing.assert_allclose(losses.sel(query="loss").item(), cross_entropy(task.model, (x, y)).mean())
    up, down = (leave_out(task, start, order, [4], weight=w).effect for w in (1 + 1e-5, 1 - 1e-5))
    exact = unrolled_influence(task, start, order, [4])
    np.testing.assert_allclose(exact.value, (up - down) / 2e-5 / 4, rtol=1e-6)
    small = replace(start, optimizer=replace(SGD, learning_rate=1e-6))
    expected = unrolled_influence(task, small, order, [4]).value[0]
    for estimator in (tracin, source):
        np.testing.assert_allclose(estimator(task, alone(small, replace(small, step=4))).value[1], expected, rtol=1e-4)


@pytest.mark.parametrize("call", CALLS)
def test_groups_are_of_candidates(call):
    x, y = points()
    model, candidates = linear(), [1, 4, 5, 9]
    some = Task(model, cross_entropy, train=(x, y), queries={"q": (x, y)}, candidates=candidates)
    every = Task(model, cross_entropy, train=(x, y), queries={"q": (x, y)})
    start = Checkpoint(0, some.state(), SGD)
    got, expected = (CALLS[call](task, start, BatchOrder(N)) for task in (some, every))
    assert got.train.values.tolist() == [str(i) for i in candidates]
    np.testing.assert_allclose(got, expected.sel(train=got.train), rtol=1e-9, atol=1e-15)


# Models.


class Branching(nn.Module):
    """Cannot be stacked: what it computes depends on numbers."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        scores = self.layer(x)
        return scores * 2 if scores.abs().sum().item() > 1e9 else scores


def test_a_model_that_cannot_be_stacked_is_looped_over_and_says_the_same():
    x, y = points()
    branching, plain = (
        Task(model, cross_entropy, train=(x, y), queries={"q": (x, y)}, train_groups=y)
        for model in (Branching(), linear())
    )
    checkpoints = [Checkpoint(0, task.state(), SGD) for task in (branching, plain)]
    assert [decided(start_at(t, c).point, "auto", 2) for t, c in zip((branching, plain), checkpoints, strict=True)] == [
        "loop",
        "stacked",
    ]
    for call in CALLS.values():
        got, expected = (call(t, c, BatchOrder(N)) for t, c in zip((branching, plain), checkpoints, strict=True))
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    with pytest.raises(RuntimeError, match="vmap"):
        window_ablation(branching, alone(checkpoints[0]), window=2, batching="stacked")


def test_a_query_loss_that_cannot_be_stacked_is_enough_to_loop():
    def scaled(model, batch):
        return cross_entropy(model, batch) * (2 if model.weight[0, 0].item() > -9 else 1)

    x, y = points()
    task = Task(
        linear(), cross_entropy, train=(x, y), queries={"a": (x, y), "b": (x, y)}, train_groups=y,
        query_losses={"b": scaled},
    )  # fmt: skip
    start = Checkpoint(0, task.state(), SGD)
    assert decided(start_at(task, start).point, "auto", 2) == "loop"
    assert window_ablation(task, alone(start), window=2).sizes["query"] == 2


def test_out_of_memory_is_not_taken_for_a_model_that_cannot_be_stacked():
    x, y = points()

    def loss(model, batch):
        if torch._C._functorch.maybe_current_level():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cross_entropy(model, batch)

    task = Task(linear(), loss, train=(x, y), queries={"q": (x, y)}, train_groups=y)
    with pytest.raises(torch.OutOfMemoryError):
        window_ablation(task, alone(Checkpoint(0, task.state(), SGD)), window=2)


@pytest.mark.parametrize("call", CALLS)
def test_the_users_model_is_untouched_and_a_layer_used_twice_is_one_layer(call):
    torch.manual_seed(0)
    shared = nn.Linear(4, 4, dtype=torch.float64)
    model = nn.Sequential(shared, nn.Tanh(), shared, linear()).eval()
    x, y = points()
    task = Task(model, cross_entropy, train=(x, y), queries={"q": (x, y)}, train_groups=y)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    start = Checkpoint(0, task.state(), replace(SGD, learning_rate=1e-6))
    got = CALLS[call](task, start, BatchOrder(N)).values[0, :, 0]
    assert {id(p) for p in model.parameters()} == set(before)
    assert all(torch.equal(before[id(p)], p) and p.requires_grad and p.grad is None for p in model.parameters())

    parameters = list(model.parameters())

    def slope(rows):
        grads = torch.autograd.grad(cross_entropy(model, (x[rows], y[rows])).mean(), parameters)
        return torch.cat([g.reshape(-1) for g in grads])

    influence = np.array([(-4e-6 * slope(y == k) @ slope(slice(None))).item() / N for k in range(3)])
    effect = influence * 4 * (0.8 - 1)
    expected = effect if call in ("window_ablation", "leave_out") else influence
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * abs(expected).max())


class Normalised(nn.Module):
    """Training does not see the norm; forward mode would."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(linear().weight.data)

    def forward(self, x):
        with torch.no_grad():
            norm = self.w.norm(dim=1, keepdim=True)
        return x @ (self.w / norm).T


def test_what_is_hidden_from_training_is_hidden_from_tracin_and_refused_where_curvature_is_needed():
    x, y = points()
    task = Task(Normalised(), cross_entropy, train=(x, y), queries={"q": (x, y)}, train_groups=y)
    start = Checkpoint(0, task.state(), SGD)
    w = task.model.w

    def slope(rows):
        return torch.autograd.grad(cross_entropy(task.model, (x[rows], y[rows])).mean(), w)[0].reshape(-1)

    expected = [(-0.2 * 4 / N * slope(y == k) @ slope(slice(None))).item() for k in range(3)]
    np.testing.assert_allclose(CALLS["tracin"](task, start, None).values[0, :, 0], expected, rtol=1e-10)
    for call in ("unrolled_influence", "source"):
        with pytest.raises(ValueError, match="hidden from differentiation"):
            CALLS[call](task, start, BatchOrder(N))


@pytest.mark.parametrize("call", CALLS)
def test_the_mode_in_which_the_caller_computes_makes_no_difference(call):
    x, y = points()

    def got():
        task = Task(linear(), cross_entropy, train=(x, y), queries={"q": (x, y)}, train_groups=y)
        return CALLS[call](task, Checkpoint(0, task.state(), SGD), BatchOrder(N)).values

    usual = got()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            np.testing.assert_array_equal(got(), usual)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["(B, B)", "mean", "noise", "NaN"])
def test_losses_that_cannot_be_used_are_refused_with_their_reason(call, kind):
    x, _ = points()
    y = x.sum(1)
    losses = {
        "(B, B)": lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1], reduction="none"),
        "mean": lambda model, batch: nn.functional.mse_loss(model(batch[0])[:, 0], batch[1]),
        "noise": lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2 + torch.rand(len(batch[1])),
        "NaN": lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
    }
    words = {
        "(B, B)": r"expected \(4,\) or|depends on the rest of its batch",
        "mean": "one loss per sample",
        "noise": "must be deterministic",
        "NaN": r"queries\['q'\]: the loss of sample 5 is not finite",
    }
    bad = x.clone()
    bad[5, 2] = torch.nan
    task = Task(
        nn.Linear(4, 1).double(), losses[kind], train=(x, y), queries={"q": (bad if kind == "NaN" else x, y)},
        train_groups=[0] * 6 + [1] * 6,
    )  # fmt: skip
    with pytest.raises(ValueError, match=words[kind]) as refused:
        CALLS[call](task, Checkpoint(0, task.state(), SGD), BatchOrder(N))
    if kind != "noise":  # whose words hold a random number
        assert "step 0" not in str(refused.value)  # said once, not for every checkpoint


def test_half_precision_weights_are_retrained_in_single_precision():
    x, y = points(dtype=torch.float32)

    def loss(model, batch):
        scores = model(batch[0].to(model.weight.dtype)).float()
        return nn.functional.cross_entropy(scores, batch[1], reduction="none")

    model = linear(dtype=torch.bfloat16)
    task = Task(model, loss, train=(x, y), queries={"q": (x, y)}, train_groups=y)
    half, single = (
        Checkpoint(0, {n: p.detach().to(d) for n, p in model.named_parameters()}, replace(SGD, learning_rate=0.01))
        for d in (torch.bfloat16, torch.float32)
    )
    got, expected = (window_ablation(task, alone(c), window=10).effect for c in (half, single))
    np.testing.assert_array_equal(got, expected)
    assert (abs(got) > 1e-5).any()


# Checkpoints that cannot be used.


def broken_run(task, optimizer=SGD):
    good = list(train_and_record(task, optimizer, BatchOrder(len(task.train)), [0, 5, 10, 15, 20]))
    good[1] = replace(good[1], optimizer=None)
    good[2] = replace(good[2], params={"0.weight": good[2].params["0.weight"]})

    def load(step):
        if step == 15:
            raise ValueError("the file of step 15 is damaged")
        return next(c for c in good if c.step == step)

    return Trajectory((0, 5, 10, 15, 20), load), Trajectory((0, 20), load)


@pytest.mark.parametrize(
    "estimate",
    [
        lambda task, run: window_ablation(task, run, window=3),
        lambda task, run: tracin(task, run),
        lambda task, run: source(task, run, segments=2),
    ],
    ids=["window_ablation", "tracin", "source"],
)
def test_checkpoints_that_cannot_be_used_are_left_out_with_reasons_as_if_they_were_not_there(estimate):
    task = classifier()
    broken, without = broken_run(task)
    got, expected = estimate(task, broken), estimate(task, without)
    assert got.step.values.tolist() == [0, 20]
    name = "effect" if "effect" in got else "value"
    np.testing.assert_array_equal(got[name], expected[name])
    omitted = json.loads(got.attrs["omitted"])
    assert set(omitted) == {"5", "10", "15"}
    for step, reason in (("5", "which optimizer"), ("10", "lacks parameter"), ("15", "is damaged")):
        assert reason in omitted[step]
    bad = Trajectory((5, 10, 15), broken.load)
    with pytest.raises(ValueError, match=r"no checkpoint can be used\. step 5: .*step 10: .*step 15: ") as refused:
        estimate(task, bad)
    assert "damaged" in str(refused.value)


def test_a_learning_rate_of_zero_leaves_a_window_out_and_adds_nothing_to_tracin_and_source():
    task = classifier()
    first, *others = train_and_record(task, SGD, BatchOrder(60), [0, 3, 6, 9])
    resting = replace(first, optimizer=replace(first.optimizer, learning_rate=0.0))
    run = alone(resting, *others)
    got = window_ablation(task, run, window=3)
    assert got.step.values.tolist() == [3, 6, 9]
    assert "learning rate at step 0 is 0" in json.loads(got.attrs["omitted"])["0"]
    for estimator in (tracin, source):
        value = estimator(task, run).value
        assert not value.sel(step=[0, 3]).values.any()
        np.testing.assert_allclose(value.sel(step=[6, 9]), estimator(task, alone(*others)).value[1:], rtol=1e-12)


def test_a_folder_is_a_trajectory(tmp_path):
    task = classifier()
    checkpoints = list(train_and_record(task, SGD, BatchOrder(60), [0, 4]))
    for checkpoint in checkpoints:
        write_checkpoint(tmp_path, checkpoint)
    for place in (tmp_path, str(tmp_path)):
        for estimate in (
            lambda run: window_ablation(task, run, window=2).effect,
            lambda run: tracin(task, run).value,
            lambda run: source(task, run).value,
            lambda run: replay(task, run).updates,
        ):
            np.testing.assert_allclose(estimate(place), estimate(alone(*checkpoints)), rtol=1e-9)


def test_on_step_is_told_of_all_replays():
    task = classifier()
    start, seen = start_at(task, Checkpoint(0, task.state(), SGD)), []
    train(
        start, start.state(3), [Schedule()] * 3, BatchOrder(60), range(2), lambda _, s: seen.append(s.params.shape[0])
    )
    assert seen == [3, 3]


def test_unroll_needs_no_stacking():
    x, y = points()
    task = Task(Branching(), cross_entropy, train=(x, y), queries={"q": (x, y)}, train_groups=y)
    start = Checkpoint(0, task.state(), SGD)
    got = unroll(task, start, [Schedule.whole_run([k], 2.0) for k in range(5)], BatchOrder(N), [3], max_replays=2)
    up, down = (
        retrain(task, start, [Schedule.whole_run([k], 1 + d) for k in range(5)], BatchOrder(N), [3])
        for d in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(got, (up - down) / 2e-5, rtol=1e-6)
