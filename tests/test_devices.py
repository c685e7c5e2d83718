"""Every room with model and data on a device that is not the CPU: nothing mixes devices, and the numbers are the CPU's.

The device is pretended (``pretended.py``), so that this needs no GPU.
"""

import copy
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import stagewise as sw
from pretended import CPU, OnDevice, OtherDeviceError, pretended
from stagewise.influence import gradients
from stagewise.retraining import training
from stagewise.retraining.training import train_and_record
from stagewise.sampling import block, drawing
from stagewise.sampling.chains import Chains, sample_block

N = 15
POSTERIOR = sw.LocalPosterior(window=3, n_beta=100.0)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_token(model, batch):
    losses = nn.functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none")
    return losses, (batch[:, 1:] > 0).double()


def samples(device):
    """Classes of points; the data stay on the CPU, as those of a ``DataLoader`` do."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    y = torch.arange(N + 8) % 3
    x = torch.randn(N + 8, 4, generator=draw, dtype=torch.float64) + nn.functional.one_hot(y, 4)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    labels = {"train_groups": y[:N], "query_groups": {"val": y[N:]}}
    return sw.Task(model.to(device), cross_entropy, train=(x[:N], y[:N]), queries={"val": (x[N:], y[N:])}, **labels)


def tokens(device):
    """Words with padding, labels of every token, and data that are on the device already."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(1, 5, (N + 6, 4), generator=draw)
    words[::3, -1] = 0
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5)).double()
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    labels = words[:, 1:].numpy() % 2
    words = words.to(device)
    return sw.Task(
        model.to(device),
        next_token,
        train=words[:N],
        queries={"val": words[N:]},
        train_groups=labels[:N],
        query_groups={"val": labels[N:]},
        objective="tokens",
        candidates=torch.arange(0, N, 2),
    )


KINDS = {"samples": samples, "tokens": tokens}
ORDER = sw.BatchOrder(N, 5, 0)
PERS = ("group", "sample")


class Case:
    """A task on a device, and a run of it that was recorded there."""

    def __init__(self, kind, device, optimizer="adam"):
        self.task = KINDS[kind](device)
        rule = sw.Optimizer(optimizer, 0.02, batch_size=5, momentum=0.5 if optimizer == "sgd" else 0.0)
        self.checkpoints = list(train_and_record(self.task, rule, ORDER, [4, 8, 12]))
        self.run = sw.Trajectory.from_checkpoints(self.checkpoints[:2])

    def chains(self, **settings):
        posterior = settings.pop("posterior", POSTERIOR)
        settings = {"chains": 3, "draws": 3, **settings}
        tree = sample_block(self.task, self.checkpoints[1], posterior, Chains(**settings))
        assert (tree["chains"]["status"] == "ok").all(), tree.attrs
        return tree.to_dict()

    def hand_set(self, **settings):
        by_hand = {"step_size": 1e-4, "burn_in": 4, "thinning": 1}
        return self.chains(posterior=sw.LocalPosterior(gamma=50.0, n_beta=50.0), **by_hand, **settings)


@cache
def shared(kind, device):
    """What no room changes: that a checkpoint can be used is checked once for all of them."""
    return Case(kind, device)


def recorded(case, folder):
    """By the recorder, from an optimiser on the device, and read again."""
    model, found = copy.deepcopy(case.task.model), []
    for rule in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = rule(model.parameters(), lr=0.01, **({"momentum": 0.9} if rule is torch.optim.SGD else {}))
        place = folder / rule.__name__
        recorder = sw.Recorder(place, model, optimizer, [2, 3], batch_size=5)
        for step in (1, 2, 3):
            rows = torch.arange(5 * step) % N
            optimizer.zero_grad()
            batch = case.task.train.batch(rows, case.task.device)
            case.task.loss(model, batch).mean().backward()
            optimizer.step()
            recorder(step, rows.to(case.task.device))
        now = sw.snapshot(3, model, optimizer, batch_size=5)
        run = sw.Trajectory.from_directory(place)
        found += [now.params, run.load(3).params, run.load(3).second_moment, run.load(3).first_moment]
        found += [sw.window_influence(case.task, run, window=2), sw.replay(case.task, run)]
        found += [sw.curriculum(case.task, now, "0", window=2, repeats=1)]
    return found


def sampled(case, folder):
    """A run folder with all that is read from it."""
    store = sw.sample(case.task, case.run, POSTERIOR, out=folder / "run", chains=4, draws=8, seed=1)
    traces = {"trusted_only": False}
    return [
        sw.bif(store, **traces),
        sw.bif(store, grouped=False, **traces),
        sw.llc(store, **traces),
        sw.loss_kernel(store, **traces),
        sw.strongest(store, 3, **traces),
        sw.susceptibilities({"all": store}, **traces),
        sw.diagnose_run(store)["rhat"],
    ]


def windows(case, folder):
    exact = sw.window_influence(case.task, case.run, window=3, per="sample", order=ORDER)
    proof = {"window": 3, "order": ORDER}
    return [
        exact,
        sw.window_influence(case.task, case.run, window=3, check=True, scratch=folder.parent, memory=1e3),
        sw.extremes_ablation(case.task, case.run, exact, count=2, draws=2, **proof),
        sw.window_lds(exact, sw.window_halves(case.task, case.run, halves=4, **proof), resamples=10),
    ]


def retrained(case, folder):
    start, steps = case.checkpoints[0], [6, 8]
    kept = [sw.Schedule(), sw.Schedule.window(torch.tensor([1, 2]), 4, 3, 0.5)]
    return [
        sw.leave_out(case.task, start, ORDER, steps),
        sw.retrain(case.task, start, kept, ORDER, steps, batching="loop"),
        sw.unroll(case.task, start, kept, ORDER, steps),
        sw.unrolled_influence(case.task, start, ORDER, steps, during=range(4, 6)),
        sw.influence_in_time(case.task, start, ORDER, [6, 9]),
        sw.replay(case.task, sw.Trajectory.from_checkpoints(case.checkpoints), ORDER),
    ]


def baselines(case, folder):
    plain = Case("samples", case.task.device, "sgd")
    return [sw.tracin(plain.task, plain.run), sw.source(plain.task, plain.run, segments=2)]


def in_place(case, folder):
    """As one of several processes, here alone."""
    settings, posterior = {"chains": 2, "draws": 2, "batch_size": 5}, sw.LocalPosterior(window=3)
    store = sw.sharded.sample(case.task, case.run, posterior, out=folder / "in place", **settings)
    exact = [sw.sharded.window_influence(case.task, case.run, window=3, per=per, order=ORDER) for per in PERS]
    return [*exact, store.load(4).to_dict()]


def one_by_one(case, sampler, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "_MOST_NUMBERS", 1)
        return case.hand_set(sampler=sampler, batching="loop", **settings)


SAMPLES = {
    "underdamped": lambda c, _: c.chains(),
    "n_beta by a pilot": lambda c, _: c.chains(posterior=sw.LocalPosterior(window=3)),
    "sgld in a loop": lambda c, _: c.hand_set(sampler="sgld", batching="loop", reflect=False),
    "rmsprop_sgld": lambda c, _: c.hand_set(sampler="rmsprop_sgld"),
    "minibatches": lambda c, _: c.chains(batch_size=5, posterior=sw.LocalPosterior(window=3)),
    "minibatches of their own": lambda c, _: c.hand_set(batch_size=5, control_variate=False),
    "not centred": lambda c, _: c.chains(posterior=sw.LocalPosterior(window=3, n_beta=100.0, centred=False)),
    "first order beside chains": lambda c, _: c.chains(linear=True, batch_size=5),
    "window": lambda c, _: c.chains(sampler="window", linear=True, posterior=sw.LocalPosterior(window=3)),
    "one by one": lambda c, _: [
        one_by_one(c, "underdamped", batch_size=5),
        one_by_one(c, "rmsprop_sgld", batch_size=5, control_variate=False),
        one_by_one(c, "sgld", linear=True),
    ],
    "some parameters": lambda c, _: c.chains(
        posterior=sw.LocalPosterior(window=3, n_beta=100.0, parameters=("0.*[:2]",))
    ),
    "moments estimated": lambda c, _: sw.estimated_second_moment(c.task, c.checkpoints[0], batches=4).second_moment,
}
ROOMS = {
    "a run folder": sampled,
    "recorder and what it wrote": recorded,
    "windows": windows,
    "retraining": retrained,
    "window of groups": lambda c, _: [
        sw.window_influence(c.task, c.run, window=3, mode=mode, repeats=2) for mode in ("forward", "reverse")
    ],
    "window, expected": lambda c, _: sw.window_influence(c.task, c.run, window=3, expected=True),
    "ablation": lambda c, _: [sw.window_ablation(c.task, c.run, window=3, batching=how) for how in ("stacked", "loop")],
    "damped": lambda c, _: [
        sw.damped_influence(c.task, c.run, POSTERIOR, curvature=how, per=per)
        for how, per in (("gauss_newton", "group"), ("hessian", "sample"), ("exact", "group"))
    ],
    "response": lambda c, _: [sw.response_influence(c.task, c.run, POSTERIOR, at=at) for at in ("path", "checkpoint")],
    "gradients": lambda c, _: [sw.gradient_product(c.task, c.run, POSTERIOR, per=per) for per in ("group", "sample")],
    "baselines": baselines,
    "written in place": in_place,
}
TOKENS = {
    "chains": lambda c, _: c.chains(),
    "single tokens": lambda c, _: c.chains(single_tokens=True, reflect=False),
    "minibatches of their own": lambda c, _: c.hand_set(batch_size=5, control_variate=False),
    "window": lambda c, _: sw.window_influence(c.task, c.run, window=3, per="token"),
    "windows of groups": lambda c, _: sw.window_influence(c.task, c.run, window=3, mode="forward", check=True),
    "ablation": lambda c, _: sw.window_ablation(c.task, c.run, window=3, repeats=1),
    "leaving out": lambda c, _: sw.leave_out(c.task, c.checkpoints[0], ORDER, [7]),
    "written in place": in_place,
    "damped": lambda c, _: sw.damped_influence(c.task, c.run, POSTERIOR, per="token"),
    "gradients": lambda c, _: sw.gradient_product(c.task, c.run, POSTERIOR),
}
ALL = [("samples", name, room) for name, room in (SAMPLES | ROOMS).items()]
ALL += [("tokens", name, room) for name, room in TOKENS.items()]


def numbers(found):
    """All that was found, as arrays."""
    if isinstance(found, xr.Dataset):
        return numbers({name: found[name] for name in found.data_vars if found[name].dtype.kind in "biuf"})
    if isinstance(found, xr.DataArray):
        return [found.values]
    if isinstance(found, torch.Tensor):
        return [found.detach().cpu().numpy()]
    return [part for each in (found.values() if isinstance(found, Mapping) else found) for part in numbers(each)]


@pytest.mark.parametrize(("kind", "room"), [pytest.param(k, room, id=f"{k}: {name}") for k, name, room in ALL])
def test_a_room_stays_on_the_device_and_gives_the_numbers_of_the_cpu(kind, room, tmp_path):
    expected = numbers(room(shared(kind, CPU), tmp_path / "cpu"))
    with pretended() as device:
        got = numbers(room(shared(kind, device), tmp_path / "device"))
    assert len(got) == len(expected) > 0
    for there, here in zip(got, expected, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-9, atol=1e-12)


REFUSED = {
    "arrays of both": lambda here, there: here + there,
    "a number of the device with an array of the CPU": lambda here, there: here * there.sum(),
    "matrices": lambda here, there: there @ here.mT,
    "an index of the device into the CPU": lambda here, there: here[there.long()],
    "sums into another device": lambda here, there: there.index_add(0, torch.zeros(2, dtype=torch.long), there),
    "a joined array": lambda here, there: torch.cat([here, there]),
    "a generator of the CPU": lambda here, there: torch.randn(2, device=there.device, generator=torch.Generator()),
    "a generator of the device": lambda here, there: torch.randn(2, generator=torch.Generator(there.device)),
    "numpy": lambda here, there: there.numpy(),
    "an array of it": lambda here, there: np.asarray(there),
    "stacked": lambda here, there: torch.func.vmap(lambda row: row * here[0])(there),
}
ALLOWED = {
    "a number of the CPU": lambda here, there: there * here.sum(),
    "an index of the CPU": lambda here, there: there[torch.tensor([1, 0])],
    "a copy": lambda here, there: there.copy_(here),
    "there and back": lambda here, there: here.to(there).cpu() + here,
    "a number read": lambda here, there: there.sum().item(),
    "a list": lambda here, there: there.tolist(),
    "a generator there": lambda here, there: torch.randn(
        2, device=there.device, generator=torch.Generator(there.device)
    ),
    "other weights in a module": lambda here, there: setattr(nn.Linear(2, 2).to(there.device).weight, "data", there),
}


@pytest.mark.parametrize("operation", REFUSED.values(), ids=REFUSED)
def test_the_pretended_device_refuses_what_a_gpu_refuses_even_if_the_error_is_caught(operation):
    with pytest.raises(OtherDeviceError), pretended() as device, pytest.raises((OtherDeviceError, RuntimeError)):
        operation(torch.ones(2, 2), torch.zeros(2, 2, device=device))


@pytest.mark.parametrize("operation", ALLOWED.values(), ids=ALLOWED)
def test_the_pretended_device_does_what_a_gpu_does(operation):
    with pretended() as device:
        operation(torch.ones(2, 2), torch.zeros(2, 2, device=device))


def test_new_numbers_in_a_parameter_of_the_pretended_device_are_those_that_are_used():
    with pretended() as device:
        layer = nn.Linear(2, 1, bias=False).to(device)
        assert isinstance(layer.weight, nn.Parameter)
        assert isinstance(layer.weight, OnDevice)
        layer.weight.data = torch.full((1, 2), 3.0, device=device)
        assert layer(torch.ones(1, 2, device=device)).item() == 6


def on_cpu(function):
    return lambda *args, **kwargs: function(*args, **kwargs).cpu()


PLANTED = {
    "noise of the CPU": (drawing, "noise_source", lambda *_: torch.Generator().manual_seed(0), SAMPLES["underdamped"]),
    "weights left on the CPU": (training, "sample_weights_of", on_cpu(training.sample_weights_of), ROOMS["ablation"]),
    "gradients left on the CPU": (gradients, "group_gradients", on_cpu(gradients.group_gradients), ROOMS["gradients"]),
    "losses left on the device": (torch.Tensor, "cpu", lambda tensor: tensor, SAMPLES["underdamped"]),
}


@pytest.mark.parametrize(("where", "name", "bug", "room"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_caught(where, name, bug, room, monkeypatch, tmp_path):
    def walk():
        with pretended() as device:
            case = Case("samples", device)
            monkeypatch.setattr(where, name, bug)
            room(case, tmp_path)

    with pytest.raises(OtherDeviceError):
        walk()
