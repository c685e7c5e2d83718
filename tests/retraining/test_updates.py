"""Every update held against torch.optim and clip_grad_norm_, with all that a checkpoint says."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer, ParameterGroup
from stagewise.retraining.leave_out import leave_out, retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.start import start_at
from stagewise.retraining.training import train, train_and_record
from stagewise.retraining.unrolling import unroll
from stagewise.task import Task

N, STEPS = 20, 7
ORDER = BatchOrder(N, 8, seed=2)
LAYERS = {"first": ("0.weight", "0.bias"), "middle": ("2.weight", "2.bias"), "last": ("4.weight", "4.bias")}
NAMES = tuple(name for names in LAYERS.values() for name in names)

TORCH = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
}
RATES = {"sgd": 0.3, "momentum": 0.1, "adam": 0.02, "adamw": 0.02}


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network(unused=False):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if unused:
        model.pooler = nn.Linear(3, 2).double()
        model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:5]), x)
    for parameter in model.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator, dtype=torch.float64), torch.arange(N) % 3


def task_of(model, loss=cross_entropy):
    return Task(model, loss, train=data(), queries={"q": data()}, train_groups=data()[1])


def grouping(kind, rate, decay):
    """Groups as torch takes them and as a checkpoint says them."""
    chosen = {
        "one": [(NAMES, rate, decay)],
        "head only": [(LAYERS["last"], rate, decay)],
        "own rates and decays": [
            (("0.weight", "2.weight", "4.weight"), rate, decay),
            (("0.bias", "2.bias"), rate / 3, 0.0),
            (("4.bias",), 0.0, decay),
        ],
    }[kind]
    return chosen, () if kind == "one" else tuple(ParameterGroup(*group) for group in chosen)


def torch_run(kind, groups, clip, rates, frozen_until=0, model=None):
    """The same run by torch: weights after every update, and the optimizer."""
    model = model or network()
    own = dict(model.named_parameters())
    make, options = TORCH[kind]
    theirs = make(
        [{"params": [own[n] for n in names], "lr": r, "weight_decay": d} for names, r, d in groups], **options
    )
    base, after = [group["lr"] for group in theirs.param_groups], []
    for step in range(STEPS):
        for name in LAYERS["first"]:
            own[name].requires_grad_(step >= frozen_until)
        for group, rate in zip(theirs.param_groups, base, strict=True):
            group["lr"] = rate * rates[step]
        model.zero_grad()
        index = ORDER(step)
        cross_entropy(model, (data()[0][index], data()[1][index])).mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        theirs.step()
        after.append({name: parameter.detach().clone() for name, parameter in own.items()})
    return after, theirs, own


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("clip", [None, 0.2, 100.0])
@pytest.mark.parametrize("groups", ["one", "head only", "own rates and decays"])
def test_every_update_is_that_of_torch(kind, clip, groups, warm_up):
    rate, decay = RATES[kind], 0.05
    theirs, said = grouping(groups, rate, decay)
    rates = [min(1.0, step / 4) for step in range(STEPS)] if warm_up else [1.0] * STEPS
    expected = torch_run(kind, theirs, clip, rates)[0]
    optimizer = Optimizer(
        "sgd" if kind in ("sgd", "momentum") else "adam",
        rate,
        momentum=TORCH[kind][1].get("momentum", 0.0),
        betas=(0.8, 0.95),
        eps=1e-6,
        weight_decay=decay,
        decoupled=kind == "adamw",
        clip_norm=clip,
        groups=said,
    )
    start, met = start_at(task_of(network()), Checkpoint(0, network().state_dict(), optimizer)), []
    train(
        start, start.state(2), [Schedule()] * 2, ORDER, range(STEPS), lambda _, state: met.append(state.params),
        learning_rate=lambda step: rate * rates[step],
    )  # fmt: skip
    errors = []
    for ours, truth in zip(met, expected, strict=True):
        torch.testing.assert_close(ours[0], ours[1], rtol=1e-12, atol=1e-14)
        for name, tensor in start.point.vector.unflatten(ours[0]).items():
            torch.testing.assert_close(tensor, truth[name], rtol=1e-11, atol=1e-13)
            errors.append((tensor - truth[name]).abs().max().item())
    moved = start.point.vector.flatten(expected[-1]) - start.params
    assert (moved != 0).sum() > 10
    print(f"largest difference {max(errors):.1e}")


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_a_layer_that_was_unfrozen_late_has_its_own_count_and_zero_moments_until_then(kind, clip):
    """At the checkpoint, after three updates, the first layer has no state; Adam's bias correction starts at 1."""
    rate, decay = RATES[kind], 0.05
    groups, _ = grouping("one", rate, decay)
    expected, _, _ = torch_run(kind, groups, clip, [1.0] * STEPS, frozen_until=3)
    optimizer = torch_optimizer_after(kind, groups, clip, 3)
    checkpoint = recorded_from_torch(*optimizer, kind, rate, decay, clip, step=3)
    if kind != "momentum":
        assert set(NAMES) - set(checkpoint.first_moment) == set(LAYERS["first"])
    start = start_at(task_of(network()), checkpoint)
    state = train(start, start.state(), [Schedule()], ORDER, range(3, STEPS))
    for name, tensor in start.point.vector.unflatten(state.params[0]).items():
        torch.testing.assert_close(tensor, expected[-1][name], rtol=1e-11, atol=1e-13)
    if kind != "momentum":  # the count is carried on
        later = start.recorded(STEPS, state)
        assert later.update_counts == dict.fromkeys(LAYERS["first"], STEPS - 3)


def torch_optimizer_after(kind, groups, clip, steps):
    """The torch run up to a step, with the first layer frozen."""
    model = network()
    own = dict(model.named_parameters())
    make, options = TORCH[kind]
    theirs = make(
        [{"params": [own[n] for n in names], "lr": r, "weight_decay": d} for names, r, d in groups], **options
    )
    for name in LAYERS["first"]:
        own[name].requires_grad_(False)
    for step in range(steps):
        model.zero_grad()
        index = ORDER(step)
        cross_entropy(model, (data()[0][index], data()[1][index])).mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        theirs.step()
    return theirs, own


def recorded_from_torch(theirs, own, kind, rate, decay, clip, step):
    """What a recorder reads off a torch optimizer."""
    memory = {name: theirs.state.get(parameter, {}) for name, parameter in own.items()}
    first = {n: m.get("exp_avg", m.get("momentum_buffer")) for n, m in memory.items() if m}
    second = {n: m["exp_avg_sq"] for n, m in memory.items() if "exp_avg_sq" in m}
    optimizer = Optimizer(
        "sgd" if kind == "momentum" else "adam",
        rate,
        momentum=0.9 if kind == "momentum" else 0.0,
        betas=(0.8, 0.95),
        eps=1e-6,
        weight_decay=decay,
        decoupled=kind == "adamw",
        clip_norm=clip,
    )
    return Checkpoint(step, {n: p.detach() for n, p in own.items()}, optimizer, first, second)


@pytest.mark.parametrize("batching", ["stacked", "loop"])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_parameter_that_no_loss_uses_stays_where_it_is_weight_decay_and_all(kind, step, batching):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pooler = network(), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.body(x)

    task, decay = task_of(Pooled()), 0.3
    optimizer = Optimizer(
        "adam" if kind.startswith("adam") else "sgd", 0.05, momentum=0.9 if kind == "momentum" else 0.0,
        weight_decay=decay, decoupled=kind == "adamw", clip_norm=0.5,
    )  # fmt: skip
    state = task.state()
    moments = {name: torch.full_like(tensor, 0.1) for name, tensor in state.items() if "pooler" not in name}
    checkpoint = Checkpoint(step, state, optimizer, moments if step else {}, moments if step else {})
    start = start_at(task, checkpoint)
    after = train(start, start.state(2), [Schedule()] * 2, ORDER, range(step, step + 5), batching=batching)
    named = start.point.vector.unflatten(after.params)
    for name, tensor in state.items():
        moved = not torch.equal(named[name][0], tensor)
        assert moved == ("pooler" not in name), name
    if kind.startswith("adam"):
        counts = dict(zip(start.point.vector.names, after.counts[0].tolist(), strict=True))
        assert {counts[n] for n in counts if "pooler" in n} == {0}
        assert {counts[n] for n in counts if "pooler" not in n} == {step + 5}


def test_gradients_of_parameters_that_are_not_updated_count_for_the_norm():
    """Clipping by the head's gradient alone would take longer steps."""
    groups, said = grouping("head only", 0.3, 0.0)
    expected = torch_run("sgd", groups, 0.2, [1.0] * STEPS)[0][0]
    task = task_of(network())
    rule = Optimizer("sgd", 0.3, clip_norm=0.2, groups=said)
    whole, alone = (
        next(iter(train_and_record(t, rule, ORDER, [1]))).params["4.weight"] for t in (task, frozen_body(task))
    )
    torch.testing.assert_close(whole, expected["4.weight"], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(alone, expected["4.weight"], rtol=1e-4)


def frozen_body(task):
    model = copy.deepcopy(task.model)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return task_of(model)


def test_moments_given_at_step_zero_are_used():
    """A run that goes on with the optimizer of an earlier one; its counts are not 0."""
    _, theirs, own = torch_run("adam", grouping("one", 0.02, 0.0)[0], None, [1.0] * STEPS)
    checkpoint = replace(recorded_from_torch(theirs, own, "adam", 0.02, 0.0, None, 0), step=0)
    counted = replace(checkpoint, update_counts=dict.fromkeys(NAMES, STEPS))
    task = task_of(network())
    start = start_at(task, counted)
    after = train(start, start.state(), [Schedule()], ORDER, range(1))
    model, index = network(), ORDER(0)
    model.load_state_dict(checkpoint.params)
    again = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    again.load_state_dict(theirs.state_dict())
    cross_entropy(model, (data()[0][index], data()[1][index])).mean().backward()
    again.step()
    expected = start.point.vector.flatten(dict(model.named_parameters()))
    torch.testing.assert_close(after.params[0], expected, rtol=1e-11, atol=1e-13)
    empty = start_at(task, replace(counted, first_moment={}, second_moment={}, update_counts={}))
    assert not empty.state().first_moment.any()


def test_a_moment_of_another_shape_is_refused_and_not_read_in_another_order():
    state = network().state_dict()
    moments = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    moments["0.weight"] = torch.zeros(4, 5, dtype=torch.float64)  # as many numbers as (5, 4)
    rule = Optimizer("adam", 0.1)
    checkpoint = Checkpoint(3, state, rule, moments, {n: torch.ones_like(t) for n, t in state.items()})
    with pytest.raises(CheckpointError, match=r"first moment of '0.weight' has shape \(4, 5\), the parameter \(5, 4\)"):
        start_at(task_of(network()), checkpoint).state()


def test_groups_scale_with_a_learning_rate_that_is_given_and_with_one_that_was_zero_all_alike():
    _, said = grouping("own rates and decays", 0.3, 0.0)
    rule = Optimizer("sgd", 0.3, groups=said)
    start = start_at(task_of(network()), Checkpoint(0, network().state_dict(), rule))
    np.testing.assert_allclose(start.rule.rates_at(0, None), [0.3, 0.1, 0.3, 0.1, 0.3, 0.0], rtol=1e-12)
    np.testing.assert_allclose(start.rule.rates_at(0, lambda _: 0.6), [0.6, 0.2, 0.6, 0.2, 0.6, 0.0], rtol=1e-12)
    resting = replace(rule, learning_rate=0.0, groups=tuple(replace(group, learning_rate=0.0) for group in said))
    start = start_at(task_of(network()), Checkpoint(0, network().state_dict(), resting))
    assert start.rule.rates_at(0, lambda _: 0.6).tolist() == [0.6] * 6
    odd = replace(rule, learning_rate=0.0)
    start = start_at(task_of(network()), Checkpoint(0, network().state_dict(), odd))
    with pytest.raises(ValueError, match="rate of most parameters, which is 0 at the checkpoint"):
        start.rule.rates_at(0, lambda _: 0.6)


DIFFERENTIATED = {
    "sgd, clipped": Optimizer("sgd", 0.3, clip_norm=0.2),
    "momentum, clipped, head only": Optimizer(
        "sgd", 0.1, momentum=0.9, clip_norm=0.2, groups=grouping("head only", 0.1, 0.02)[1]
    ),
    "adam, clipped, groups": Optimizer(
        "adam", 0.02, betas=(0.8, 0.95), eps=1e-4, clip_norm=0.2, groups=grouping("own rates and decays", 0.02, 0.1)[1]
    ),
    "adamw, clipped": Optimizer("adam", 0.02, eps=1e-4, weight_decay=0.1, decoupled=True, clip_norm=0.2),
    "adamw, groups": Optimizer(
        "adam", 0.02, eps=1e-4, decoupled=True, groups=grouping("own rates and decays", 0.02, 0.1)[1]
    ),
    "sgd, never as long as the norm": Optimizer("sgd", 0.3, clip_norm=100.0),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_unrolling_is_the_derivative_of_retraining_through_clipping_groups_and_counts(name):
    task, optimizer = task_of(network()), DIFFERENTIATED[name]
    start, steps = Checkpoint(0, task.state(), optimizer), [1, 2, 9]

    def schedules(weight):
        whole = [Schedule.whole_run(range(k, N, 3), weight) for k in range(3)]
        return [*whole, Schedule.window([4, 7, 11], 2, 3, weight)]

    got = unroll(task, start, schedules(2.0), ORDER, steps)
    up, down = (retrain(task, start, schedules(1 + d), ORDER, steps) for d in (1e-6, -1e-6))
    expected = (up - down) / 2e-6
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * abs(expected).max().item())
    assert abs(expected).max() > 1e-4


def test_a_learning_rate_of_zero_that_is_held_is_refused_and_one_that_rises_is_not():
    task = task_of(network())
    start = Checkpoint(0, task.state(), Optimizer("adam", 0.0))
    for call in (
        lambda **o: retrain(task, start, [Schedule()], ORDER, [5], **o),
        lambda **o: leave_out(task, start, ORDER, [5], **o),
        lambda **o: unroll(task, start, [Schedule.whole_run([0], 0.0)], ORDER, [5], **o),
    ):
        with pytest.raises(ValueError, match="learning rate at step 0 is 0, as in front of a warm-up"):
            call()
        call(learning_rate=lambda step: 0.01 * step)


def test_recording_says_the_learning_rates_of_the_updates_between():
    recorded = list(train_and_record(task_of(network()), Optimizer("sgd", 0.1), ORDER, [0, 2, 5]))
    for before, after in pairwise(recorded):
        assert after.learning_rates == (0.1,) * (after.step - before.step)
