"""Recording a run must not change it, and must keep enough to go on from any checkpoint."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stagewise.checkpoints import (
    CheckpointError,
    Optimizer,
    Recorder,
    Trajectory,
    linear,
    log_spaced,
    scan,
)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "decoupled": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.25), decoupled_weight_decay=True),
}
RECORDED = {
    "sgd": Optimizer("sgd", 0.05, weight_decay=0.01, batch_size=8),
    "momentum": Optimizer("sgd", 0.05, momentum=0.9, batch_size=8),
    "adam": Optimizer("adam", 0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02, batch_size=8),
    "adamw": Optimizer("adam", 0.01, weight_decay=0.1, decoupled=True, batch_size=8),
    "decoupled": Optimizer("adam", 0.25, decoupled=True, batch_size=8),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)).double()


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One update whose data and dropout come from the global generator."""
    inputs, labels = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got, want):
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_recorded_run_is_the_unrecorded_run_bit_for_bit(tmp_path, kind):
    def train(record):
        model = make_model()
        optimizer = OPTIMIZERS[kind](model.parameters())
        recorder = Recorder(tmp_path, model, optimizer, steps=range(6)) if record else lambda _: None
        recorder(0)
        remembered_before = len(optimizer.state)
        for step in range(1, 6):
            update(model, optimizer)
            recorder(step)
        return state_of(model), optimizer.state_dict(), torch.get_rng_state(), remembered_before

    model, optimizer, rng, before = train(record=True)
    plain_model, plain_optimizer, plain_rng, _ = train(record=False)
    assert_same(model, plain_model)
    assert str(optimizer) == str(plain_optimizer)
    assert torch.equal(rng, plain_rng)
    assert before == 0, "looking at the optimizer made it remember something"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_recorded_is_what_the_run_held(tmp_path, kind):
    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    record = Recorder(tmp_path, model, optimizer, steps=(0, 3), batch_size=8)
    record(0)
    held = {0: (state_of(model), {})}
    for step in range(1, 5):
        update(model, optimizer)
        record(step)
        memory = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
        held[step] = (state_of(model), copy.deepcopy(memory))

    run = Trajectory.from_directory(tmp_path)
    assert run.steps == (0, 3)
    for step in run.steps:
        checkpoint, (state, memory) = run.load(step), held[step]
        assert checkpoint.optimizer == RECORDED[kind]
        assert_same(checkpoint.params, state)  # with running mean, variance and count of BatchNorm
        for moment, keys in (
            (checkpoint.first_moment, ("momentum_buffer", "exp_avg")),
            (checkpoint.second_moment, ("exp_avg_sq",)),
        ):
            assert_same(
                moment,
                {n: m[k] for n, m in memory.items() for k in keys if m.get(k) is not None},
            )
    assert bool(checkpoint.first_moment) == (kind != "sgd")
    assert bool(checkpoint.second_moment) == (kind in ("adam", "adamw", "decoupled"))
    assert checkpoint.params["1.num_batches_tracked"] == 3


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw"])
def test_training_resumed_from_a_checkpoint_equals_the_uninterrupted_run(tmp_path, kind):
    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    record = Recorder(tmp_path, model, optimizer, steps=(4, 10))
    for step in range(1, 11):
        update(model, optimizer)
        record(step)
        if step == 4:
            rng = torch.get_rng_state()

    checkpoint = Trajectory.from_directory(tmp_path).load(4)
    resumed = make_model()
    resumed.load_state_dict(dict(checkpoint.params))
    optimizer = OPTIMIZERS[kind](resumed.parameters())
    for name, parameter in resumed.named_parameters():
        if kind == "momentum":
            optimizer.state[parameter] = {"momentum_buffer": checkpoint.first_moment[name]}
        else:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(checkpoint.step)),
                "exp_avg": checkpoint.first_moment[name],
                "exp_avg_sq": checkpoint.second_moment[name],
            }
    torch.set_rng_state(rng)
    for _ in range(6):
        update(resumed, optimizer)
    assert_same(resumed.state_dict(), Trajectory.from_directory(tmp_path).load(10).params)


def test_recording_again_replaces_the_files_of_an_earlier_attempt(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        Recorder(tmp_path, model, optimizer, steps=[5])(5)
    assert (Trajectory.from_directory(tmp_path).load(5).params["weight"] == 2).all()


def test_steps_may_be_counted_by_tensors(tmp_path):
    model = nn.Linear(2, 1)
    record = Recorder(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1), steps=[0, 3])
    record(torch.tensor(3))
    assert list(scan(tmp_path)) == [3]


def test_tied_weights_are_recorded_once_under_the_name_that_moves(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    record = Recorder(tmp_path, model, optimizer, steps=[1])
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    record(1)
    checkpoint = Trajectory.from_directory(tmp_path).load(1)
    assert set(checkpoint.params) == set(checkpoint.second_moment) == {"0.weight"}


def test_frozen_parameters_are_kept_without_moments(tmp_path):
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    record = Recorder(tmp_path, model, optimizer, steps=[1])
    update(model, optimizer)
    record(1)
    checkpoint = Trajectory.from_directory(tmp_path).load(1)
    assert_same(checkpoint.params, model.state_dict())
    assert set(checkpoint.second_moment) == {"1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.RMSprop(p, lr=0.1), "RMSprop"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), r"SGD\(nesterov=True\)"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), r"SGD\(dampening=0.1\)"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), r"SGD\(maximize=True\)"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), r"Adam\(amsgrad=True\)"),
        (lambda p: torch.optim.AdamW(p, maximize=True), r"AdamW\(maximize=True\)"),
        (lambda p: torch.optim.NAdam(p), "NAdam"),
        (lambda p: torch.optim.Adagrad(p), "Adagrad"),
        (lambda p: type("MyAdam", (torch.optim.Adam,), {})(p), "MyAdam"),
    ],
)
def test_an_update_rule_that_cannot_be_described_leaves_weights_alone_and_warns(tmp_path, make, name):
    model = make_model()
    optimizer = make(model.parameters())
    with pytest.warns(UserWarning, match=rf"{name} is none of SGD, Adam and AdamW"):
        record = Recorder(tmp_path, model, optimizer, steps=[1])
    update(model, optimizer)
    record(1)
    checkpoint = Trajectory.from_directory(tmp_path).load(1)
    assert_same(checkpoint.params, model.state_dict())
    assert (checkpoint.optimizer, checkpoint.first_moment, checkpoint.second_moment) == (None, {}, {})


def test_weights_alone_are_recorded_without_complaint_when_asked_for(tmp_path):
    model = nn.Linear(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recorder(tmp_path, model, None, steps=[0])(0)
    assert Trajectory.from_directory(tmp_path).load(0).optimizer is None


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([], "steps is empty"),
        ([0, -1], "must not be negative, got -1"),
        ([1, 2, 1], r"repeated: \[1\]"),
        ([0.5], "must be integers"),
    ],
)
def test_bad_steps_are_refused_before_training(tmp_path, steps, reason):
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=reason):
        Recorder(tmp_path, model, torch.optim.SGD(model.parameters()), steps=steps)


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        Recorder(tmp_path / "file" / "run", nn.Linear(1, 1), None, steps=[0])


@given(first=st.integers(1, 50), extra=st.integers(0, 10**6), count=st.integers(2, 80))
def test_log_spaced_has_exactly_count_steps_with_both_ends(first, extra, count):
    last = first + extra
    steps = log_spaced(last, count, first)
    assert len(steps) == min(count, extra + 1)
    assert list(steps) == sorted(set(steps))
    assert steps[0] == first
    assert steps[-1] == last
    assert all(type(step) is int for step in steps)


def test_log_spaced_grows_by_a_constant_factor():
    assert log_spaced(1000, 4) == (1, 10, 100, 1000)
    assert log_spaced(512, 10) == tuple(2**k for k in range(10))
    assert log_spaced(10, 10) == tuple(range(1, 11))


@pytest.mark.parametrize(("last", "count", "first"), [(10, 3, 0), (5, 3, 6), (10, 1, 1), (10, 0, 1)])
def test_log_spaced_refuses_what_it_cannot_do(last, count, first):
    with pytest.raises(ValueError, match=r"log_spaced needs|count must be"):
        log_spaced(last, count, first)


def test_linear_has_both_ends():
    assert linear(10, 5) == (0, 5, 10)
    assert linear(11, 5) == (0, 5, 10, 11)
    assert linear(0, 3) == (0,)
    for last, every in ((-1, 1), (3, 0)):
        with pytest.raises(ValueError, match="linear needs"):
            linear(last, every)
