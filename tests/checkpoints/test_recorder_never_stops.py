"""Once training has begun the recorder warns, once of each kind, and the run goes on."""

import os
import re
import warnings

import numpy as np
import pytest
import torch
from small_runs import assert_same, batches, net, recorded_run, update
from torch import nn

from stagewise.checkpoints import Recorder, Trajectory, scan


def adam(model, **settings):
    return torch.optim.Adam(model.parameters(), **settings)


def test_a_full_disk_is_one_warning_and_what_comes_after_it_is_recorded_again(tmp_path, monkeypatch):
    model = net()
    optimizer = adam(model)
    record = Recorder(tmp_path, model, optimizer, range(6))
    fsync = os.fsync

    def full(*_):
        raise OSError(28, "No space left on device")

    def train():
        for step, batch in enumerate(batches(5), start=1):
            monkeypatch.setattr(os, "fsync", full if step in (2, 3) else fsync)
            update(model, optimizer, batch)
            record(step)

    with pytest.warns(UserWarning, match="step 2 was not recorded: cannot write .*No space left") as seen:
        train()
    assert len(seen) == 1
    run = Trajectory.from_directory(tmp_path)
    assert run.steps == (1, 4, 5)
    assert len(run.load(4).learning_rates) == 3, "of the updates since the last checkpoint that was written"


@pytest.mark.parametrize("step", ["7", 3.5, None, torch.tensor(1.0), torch.ones(2)])
def test_a_step_that_is_no_integer_is_a_warning(tmp_path, step):
    model = net()
    record = Recorder(tmp_path, model, adam(model), [0, 1])
    with pytest.warns(UserWarning, match="expected the number of updates made so far, got .*nothing was recorded"):
        record(step)
    record(0)
    assert list(scan(tmp_path)) == [0]


@pytest.mark.parametrize("step", [3, np.int64(3), torch.tensor(3)])
def test_any_kind_of_integer_is_a_step(tmp_path, step):
    model = net()
    Recorder(tmp_path, model, torch.optim.SGD(model.parameters()), [3])(step)
    assert list(scan(tmp_path)) == [3]


def test_a_repeated_step_keeps_what_was_saved_first_and_its_rates(tmp_path):
    model = net()
    optimizer = adam(model)
    record = Recorder(tmp_path, model, optimizer, [0, 1])
    record(0)
    update(model, optimizer, batches(1)[0])
    record(1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nn.init.zeros_(model.body.weight)
    with pytest.warns(UserWarning, match="step 1 was recorded already"):
        record(1)
    checkpoint = Trajectory.from_directory(tmp_path).load(1)
    assert_same(checkpoint.params, weights)
    assert checkpoint.learning_rates == (0.001,)


def test_a_repeated_step_that_could_not_be_written_is_written_the_next_time(tmp_path, monkeypatch):
    model = net()
    record = Recorder(tmp_path, model, None, [1])
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="step 1 was not recorded"):
        record(1)
    monkeypatch.setattr(os, "fsync", fsync)
    record(1)
    assert list(scan(tmp_path)) == [1]


def test_going_back_replaces_files_and_claims_no_rates_across_the_jump(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Recorder(tmp_path, model, optimizer, range(4))

    def train():
        for step, batch in zip([1, 2, 3, 1, 2], batches(5), strict=True):
            update(model, optimizer, batch)
            record(step)

    with pytest.warns(UserWarning, match="step 1 comes after step 3: files of the same steps are replaced"):
        train()
    run = Trajectory.from_directory(tmp_path)
    assert [len(run.load(step).learning_rates) for step in (1, 2, 3)] == [0, 1, 1]
    assert_same(run.load(2).params, model.state_dict())


@pytest.mark.parametrize("make", [adam, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)])
def test_steps_that_count_batches_instead_of_updates_are_noticed_with_every_optimizer(tmp_path, make):
    model = net()
    optimizer = make(model)
    record = Recorder(tmp_path, model, optimizer, range(0, 9, 4))
    record(0)

    def train():
        for step, batch in enumerate(batches(8), start=1):
            if step % 4 == 0:
                update(model, optimizer, batch)
            record(step)

    with pytest.warns(UserWarning, match=r"from record\(\d\) to record\(\d\) the optimizer was seen to make") as seen:
        train()
    assert len(seen) == 1
    assert [Trajectory.from_directory(tmp_path).load(step).learning_rates for step in (4, 8)] == [(), ()]


def test_steps_counted_from_0_behind_the_update_are_noticed_without_a_counter_too(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Recorder(tmp_path, model, optimizer, [0, 1])
    update(model, optimizer, batches(1)[0])
    with pytest.warns(UserWarning, match="step 0 came after 1 updates"):
        record(0)


def test_steps_off_by_one_are_noticed_where_the_optimizer_counts(tmp_path):
    model = net()
    optimizer = adam(model)
    update(model, optimizer, batches(1)[0])
    record = Recorder(tmp_path, model, optimizer, [0, 1])
    with pytest.warns(UserWarning, match=r"own count of updates is \+1 from the recorder's step 0"):
        record(0)
    assert Trajectory.from_directory(tmp_path).load(0).update_counts["head.weight"] == 1


def test_an_optimizer_that_is_not_the_one_in_use_is_noticed_and_its_moments_not_taken_for_zero(tmp_path):
    model = net()
    used, given = adam(model), adam(model)
    record = Recorder(tmp_path, model, given, [0, 2])
    record(0)
    for batch in batches(2):
        update(model, used, batch)
    with pytest.warns(UserWarning, match="seen to make 0 updates, not 2.*the one in use"):
        record(2)
    assert Trajectory.from_directory(tmp_path).load(2).first_moment == {}


@pytest.mark.parametrize("setting", [{"lr": float("nan")}, {"lr": -1.0}, {"weight_decay": "much"}, {"eps": None}])
def test_settings_that_make_no_sense_leave_the_weights_alone(tmp_path, setting):
    model = net()
    optimizer = adam(model)
    record = Recorder(tmp_path, model, optimizer, [0, 1])
    optimizer.param_groups[0].update(setting)
    with pytest.warns(UserWarning, match="could not be recorded at step 0, weights alone"):
        record(0)
    assert Trajectory.from_directory(tmp_path).load(0).optimizer is None


def test_a_failure_nobody_thought_of_does_not_stop_the_run(tmp_path, monkeypatch):
    model = net()
    record = Recorder(tmp_path, model, adam(model), [0, 1])
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="step 0 was not recorded: division by zero"):
        record(0)


def test_being_interrupted_is_not_swallowed(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    model = net()
    record = Recorder(tmp_path, model, adam(model), [0])
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record(0)


# Optimisers that one rule cannot describe: weights alone.


def weights_alone(tmp_path, model, optimizer, message):
    with pytest.warns(UserWarning, match=message) as seen:
        run, _ = recorded_run(tmp_path, model, optimizer, [1, 2], 2)
    assert len([w for w in seen if "weights are recorded without" in str(w.message)]) == 1
    for step in (1, 2):
        checkpoint = run.load(step)
        assert set(checkpoint.params) == set(model.state_dict())
        assert (checkpoint.optimizer, checkpoint.first_moment, checkpoint.update_counts) == (None, {}, {})


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (torch.optim.Adam, "betas", (0.5, 0.9)),
        (torch.optim.AdamW, "eps", 1e-3),
        (torch.optim.SGD, "momentum", 0.5),
        (torch.optim.Adam, "decoupled_weight_decay", True),
    ],
)
def test_groups_that_differ_in_what_is_recorded_once_leave_weights_alone(tmp_path, kind, key, value):
    model = net()
    optimizer = kind([{"params": model.body.parameters()}, {"params": model.head.parameters(), key: value}])
    weights_alone(tmp_path, model, optimizer, f"parameter groups disagree on {key}: .* and {re.escape(repr(value))}")


def test_an_optimizer_of_another_model_leaves_weights_alone(tmp_path):
    weights_alone(tmp_path, net(), adam(net()), "updates no parameter of this model")


@pytest.mark.filterwarnings("ignore:the optimizer also updates")
def test_groups_that_a_loop_drives_apart_later_leave_weights_alone_from_there(tmp_path):
    model = net()
    optimizer = adam(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "eps": 1e-3})
    record = Recorder(tmp_path, model, optimizer, range(2))
    record(0)  # the odd group is not of this model
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    update(model, optimizer, batches(1)[0])
    with pytest.warns(UserWarning, match="disagree on eps"):
        record(1)
    run = Trajectory.from_directory(tmp_path)
    assert (run.load(0).optimizer is None, run.load(1).optimizer is None) == (False, True)


def test_parameters_that_are_not_the_models_are_counted_and_the_rest_is_recorded(tmp_path):
    model = net()
    temperature = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    with pytest.warns(UserWarning, match="also updates 1 parameters that are not this model's"):
        run, _ = recorded_run(tmp_path, model, optimizer, [0, 1], 1)
    assert run.load(1).optimizer.groups == ()
    assert run.load(1).learning_rates == (0.1,)


def test_parameters_replaced_under_the_optimizer_are_noticed(tmp_path):
    model = net()
    record = Recorder(tmp_path, model, adam(model), [1])
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match="updates no parameter of this model"):
        record(1)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum"),
        (lambda p: torch.optim.AdamW(p, lr=0.1), "betas"),
    ],
)
def test_a_momentum_that_a_schedule_moves_is_recorded_and_said_to_move(tmp_path, make, key):
    model = net()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=9)
    with pytest.warns(UserWarning, match=f"{key} changes during this run"):
        run, _ = recorded_run(tmp_path, model, optimizer, [0, 8], 8, after=lambda _: schedule.step())
    # At both ends it is the same.
    assert getattr(run.load(0).optimizer, key) == getattr(run.load(8).optimizer, key) == optimizer.param_groups[0][key]
    assert len(run.load(8).learning_rates) == 8


def test_a_decay_that_moves_is_said_to_move(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    def grow(step):
        optimizer.param_groups[0]["weight_decay"] = 0.1 * step

    with pytest.warns(UserWarning, match="weight_decay changes during this run"):
        recorded_run(tmp_path, model, optimizer, [0, 2], 2, after=grow)


# What is certainly wrong before training begins is an error.


@pytest.mark.parametrize("norm", [-1.0, float("nan")])
def test_a_norm_that_cannot_be_is_refused(tmp_path, norm):
    with pytest.raises(ValueError, match="clip_norm must be positive, or None or 0"):
        Recorder(tmp_path, net(), None, [0], clip_norm=norm)


def test_a_good_run_is_recorded_without_a_word(tmp_path):
    model = net()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded_run(tmp_path, model, optimizer, [0, 2, 5], 5, after=lambda _: schedule.step(), clip_norm=1.0)


def test_the_hook_goes_with_the_recorder(tmp_path):
    model = net()
    optimizer = adam(model)
    records = [Recorder(tmp_path, model, optimizer, [0]) for _ in range(3)]
    assert len(optimizer._optimizer_step_pre_hooks) == 3
    del records
    assert len(optimizer._optimizer_step_pre_hooks) == 0
