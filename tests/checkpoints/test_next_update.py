"""A checkpoint says all that the next updates depend on: from it, torch's own optimisers make the run's weights."""

import copy
import itertools
import warnings

import pytest
import torch
from small_runs import continued, net, recorded_run
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from stagewise.checkpoint import ParameterGroup
from stagewise.checkpoints import Recorder, Trajectory

STEPS, LAST = (0, 1, 4, 9, 12), 12


def split(model, **head):
    """The head has settings of its own."""
    head_params = list(model.head.parameters())
    return [
        {"params": [p for p in model.parameters() if all(p is not h for h in head_params)]},
        {"params": head_params, **head},
    ]


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.05),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "momentum, foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "momentum, fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.0),
    "adam, foreach": lambda m: torch.optim.Adam(m.parameters(), lr=0.02, foreach=True),
    "adam, fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.02, fused=True),
    "adam, tensor rate": lambda m: torch.optim.Adam(
        m.parameters(), lr=torch.tensor(0.02, dtype=torch.float64), foreach=False
    ),
    "adam, decoupled": lambda m: torch.optim.Adam(
        m.head.parameters(), lr=0.02, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "head only, sgd": lambda m: torch.optim.SGD(m.head.parameters(), lr=0.1, momentum=0.5),
    "head only, adam": lambda m: torch.optim.Adam(m.head.parameters(), lr=0.02),
    "own rate": lambda m: torch.optim.SGD(split(m, lr=0.4), lr=0.1, momentum=0.9),
    "own decay": lambda m: torch.optim.Adam(split(m, weight_decay=0.3), lr=0.02),
    "own rate and decay": lambda m: torch.optim.AdamW(
        [{"params": [m.body.weight], "weight_decay": 0.2}, {"params": [m.body.bias, *m.head.parameters()], "lr": 0.05}],
        lr=0.02,
        weight_decay=0.0,
    ),
    "a group per parameter": lambda m: torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in (*m.body.parameters(), *m.head.parameters())]
    ),
}


def assert_repeats(run: Trajectory, held, steps=STEPS) -> None:
    checkpoints = [run.load(step) for step in steps]
    for start, end in itertools.pairwise(checkpoints):
        assert len(end.learning_rates) == end.step - start.step
        for name, tensor in continued(start, end).items():
            torch.testing.assert_close(tensor, held[end.step][name].detach(), rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_from_every_checkpoint_the_run_goes_on_as_it_did(tmp_path, kind):
    model = net()
    assert_repeats(*recorded_run(tmp_path, model, OPTIMIZERS[kind](model), STEPS, LAST))


@pytest.mark.parametrize("kind", ["sgd", "adam", "own rate"])
def test_clipped_gradients_are_clipped_again(tmp_path, kind):
    model = net()
    run, held = recorded_run(tmp_path, model, OPTIMIZERS[kind](model), STEPS, LAST, clip_norm=0.1)
    assert run.load(4).optimizer.clip_norm == 0.1
    assert_repeats(run, held)


SCHEDULES = {
    "warm-up from 0": lambda o: LambdaLR(o, lambda step: min(1, step / 5)),
    "warm-up of zeros": lambda o: LambdaLR(o, lambda step: float(step > 2)),
    "down to 0": lambda o: CosineAnnealingLR(o, T_max=LAST),
    "one cycle": lambda o: OneCycleLR(
        o, max_lr=[3 * group["lr"] for group in o.param_groups], total_steps=LAST + 1, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("order", ["after", "late"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["momentum", "adam", "own rate"])
@pytest.mark.filterwarnings("ignore:the learning rate was changed")
def test_every_update_has_its_own_learning_rate_wherever_the_scheduler_is_called(tmp_path, kind, schedule, order):
    model = net()
    optimizer = OPTIMIZERS[kind](model)
    scheduler = SCHEDULES[schedule](optimizer)
    assert_repeats(*recorded_run(tmp_path, model, optimizer, STEPS, LAST, **{order: lambda _: scheduler.step()}))


@pytest.mark.filterwarnings("ignore:the learning rate was changed")
def test_a_rate_set_by_hand_in_front_of_each_update_is_that_of_the_update(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)

    def schedule(step):
        optimizer.param_groups[0]["lr"] = 0.1 / step

    run, held = recorded_run(tmp_path, model, optimizer, STEPS, LAST, before=schedule)
    assert run.load(4).learning_rates == (0.1 / 2, 0.1 / 3, 0.1 / 4)
    assert_repeats(run, held)


def rates_of(run):
    return {step: run.load(step).optimizer.learning_rate for step in run.steps}


def scheduled(tmp_path, factors, order="after"):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: factors[step])
    last = len(factors) - 1
    loop = {order: lambda _: scheduler.step()}
    return recorded_run(tmp_path, model, optimizer, range(last + 1), last, **loop)[0]


def test_the_learning_rate_is_that_of_the_next_update_and_at_the_end_of_a_schedule_of_the_last(tmp_path):
    assert rates_of(scheduled(tmp_path, [1.0, 0.5, 0.25, 0.0])) == {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.25}


def test_a_warm_up_from_zero_is_recorded_with_its_rule_and_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = scheduled(tmp_path, [0.0, 0.0, 0.5, 1.0])
    assert rates_of(run) == {0: 0.0, 1: 0.0, 2: 0.5, 3: 1.0}
    assert [run.load(step).learning_rates for step in run.steps] == [(), (0.0,), (0.0,), (0.5,)]


def test_a_scheduler_called_behind_the_recorder_is_noticed(tmp_path):
    with pytest.warns(UserWarning, match=r"learning rate was changed between record\(1\) and the update after it"):
        run = scheduled(tmp_path, [1.0, 0.5, 0.25, 0.1], order="late")
    assert [run.load(step).learning_rates for step in run.steps] == [(), (1.0,), (0.5,), (0.25,)]


def test_rates_of_groups_that_go_their_own_ways_are_left_out_and_not_one_for_all(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(split(model, lr=0.4), lr=0.1)
    scheduler = LambdaLR(optimizer, [lambda _: 1.0, lambda step: 1 / (1 + step)])
    run, _ = recorded_run(tmp_path, model, optimizer, (0, 4), 4, after=lambda _: scheduler.step())
    assert run.load(4).learning_rates == ()
    assert {group.learning_rate for group in run.load(4).optimizer.groups} == {0.1, optimizer.param_groups[1]["lr"]}


@pytest.mark.filterwarnings("ignore:the optimizer also updates")
def test_the_rate_of_parameters_that_are_not_the_models_does_not_hide_its_own(tmp_path):
    model = net()
    temperature = torch.nn.Parameter(torch.zeros(999))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [temperature], "lr": 7.0}], lr=0.1)
    scheduler = LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda _: 1.0])
    run, held = recorded_run(tmp_path, model, optimizer, STEPS, LAST, after=lambda _: scheduler.step())
    assert run.load(1).optimizer.groups == ()
    assert_repeats(run, held)


def test_a_rate_that_is_a_tensor_and_changed_in_place_is_that_of_each_update(tmp_path):
    model = net()
    rate = torch.tensor(1.0, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=False)
    run, _ = recorded_run(tmp_path, model, optimizer, (0, 3), 3, after=lambda step: rate.fill_(2.0**-step))
    assert run.load(3).learning_rates == (1.0, 0.5, 0.25)


def test_layers_unfrozen_late_by_a_group_of_their_own_keep_their_own_count(tmp_path):
    model = net()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.02)

    def unfreeze(step):
        if step == 5:
            optimizer.add_param_group({"params": list(model.body.parameters()), "lr": 0.02})

    # At 4 the body still stands, at 9 it has been updated 5 times.
    run, held = recorded_run(tmp_path, model, optimizer, (0, 4, 9, 12), LAST, before=unfreeze)
    assert run.load(4).optimizer.updated == {"head.weight", "head.bias"}
    assert run.load(9).optimizer.updated == {"head.weight", "head.bias", "body.weight", "body.bias"}
    assert run.load(9).update_counts == {"body.weight": 5, "body.bias": 5}
    assert run.load(9).learning_rates == (0.02,) * 5
    assert_repeats(run, held, (0, 4))
    assert_repeats(run, held, (9, 12))


def test_layers_unfrozen_late_by_requires_grad_keep_their_own_count(tmp_path):
    model = net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    run, held = recorded_run(
        tmp_path, model, optimizer, (3, 4, 9, 12), LAST, after=lambda step: model.body.requires_grad_(step >= 4)
    )
    assert "body.weight" not in run.load(3).optimizer.updated
    assert run.load(9).update_counts == {"body.weight": 5, "body.bias": 5, "pooler.weight": 0, "pooler.bias": 0}
    assert_repeats(run, held, (4, 9, 12))


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_layers_frozen_midway_are_not_moved_by_the_moments_they_still_have(tmp_path, kind):
    model = net()
    run, held = recorded_run(
        tmp_path,
        model,
        OPTIMIZERS[kind](model),
        (0, 4, 9),
        LAST,
        after=lambda step: model.body.requires_grad_(step < 4),
    )
    assert "body.weight" in run.load(4).first_moment
    assert run.load(4).optimizer.updated.isdisjoint({"body.weight", "body.bias"})
    assert_repeats(run, held, (4, 9))


def test_all_frozen_at_the_moment_of_the_call_is_somebody_evaluating(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    run, _ = recorded_run(
        tmp_path,
        model,
        optimizer,
        (1,),
        1,
        after=lambda _: model.requires_grad_(False),
    )
    assert run.load(1).optimizer.updated == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["adam", "adam, fused", "adam, foreach"])
def test_an_optimizer_that_had_counted_before_the_run_counts_on(tmp_path, kind):
    model = net()
    optimizer = OPTIMIZERS[kind](model)
    recorded_run(tmp_path / "first", model, optimizer, (0,), 7)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run, held = recorded_run(tmp_path / "second", model, optimizer, STEPS, LAST)
    assert run.load(4).update_counts == {n: 0 if "pooler" in n else 11 for n in before}
    assert_repeats(run, held)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_a_layer_without_gradient_has_no_moments_and_a_count_of_0(tmp_path, kind):
    model = net()
    run, _ = recorded_run(tmp_path, model, OPTIMIZERS[kind](model), STEPS, LAST)
    checkpoint = run.load(9)
    assert set(checkpoint.first_moment) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert checkpoint.update_counts == ({"pooler.weight": 0, "pooler.bias": 0} if kind == "adam" else {})
    assert "pooler.weight" in checkpoint.params


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_a_new_optimizer_in_the_middle_of_a_run_has_moments_of_zero_and_not_lost_ones(tmp_path, kind):
    model = net()
    Recorder(tmp_path, model, OPTIMIZERS[kind](model), steps=[500])(500)
    checkpoint = Trajectory.from_directory(tmp_path).load(500)
    assert set(checkpoint.first_moment) == set(dict(model.named_parameters()))
    assert all((tensor == 0).all() for tensor in checkpoint.first_moment.values())
    assert set(checkpoint.update_counts.values()) == ({0} if kind == "adam" else set())
    assert bool(checkpoint.second_moment) == (kind == "adam")


# Which parameters, with which rates and decays.


def rule_of(tmp_path, optimizer, model):
    Recorder(tmp_path, model, optimizer, steps=[0])(0)
    return Trajectory.from_directory(tmp_path).load(0).optimizer


def test_one_rate_and_decay_for_the_whole_model_needs_no_groups(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(split(model), lr=0.1)
    assert rule_of(tmp_path, optimizer, model).groups == ()


def test_groups_name_what_is_updated_and_most_parameters_give_the_rate_of_all(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.head.bias], "lr": 0.5, "weight_decay": 0.0},
            {"params": [model.head.weight], "weight_decay": 0.2},
        ],
        lr=0.01,
    )
    rule = rule_of(tmp_path, optimizer, model)
    assert rule.groups == (ParameterGroup(("head.bias",), 0.5, 0.0), ParameterGroup(("head.weight",), 0.01, 0.2))
    assert (rule.learning_rate, rule.weight_decay) == (0.01, 0.2)


def test_frozen_parameters_in_the_optimizer_are_not_among_the_updated(tmp_path):
    model = net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert rule_of(tmp_path, optimizer, model).updated == {"head.weight", "head.bias", "pooler.weight", "pooler.bias"}


def test_a_frozen_body_that_the_optimizer_does_not_have_is_said_to_stand_still(tmp_path):
    # Whoever reads the file may well build a model in which everything is trainable.
    model = net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert "body.weight" not in rule_of(tmp_path, optimizer, model).updated


@pytest.mark.parametrize(("given", "recorded"), [(None, None), (0, None), (float("inf"), None), (2, 2.0)])
def test_a_norm_that_clips_nothing_is_none(tmp_path, given, recorded):
    model = net()
    Recorder(tmp_path, model, torch.optim.SGD(model.parameters()), steps=[0], clip_norm=given)(0)
    assert Trajectory.from_directory(tmp_path).load(0).optimizer.clip_norm == recorded
