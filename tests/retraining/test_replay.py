"""The replay of a run by itself: what it says where it repeats the run, where it cannot, and where it does not."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import N, Regression, classifier
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.replay import replay
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.training import train_and_record

ORDER = BatchOrder(60, 16, seed=5)
RULES = {
    "sgd": Optimizer("sgd", 0.3),
    "adam": Optimizer("adam", 0.02, weight_decay=0.03, clip_norm=0.1),
    "adamw": Optimizer("adam", 0.02, weight_decay=0.1, decoupled=True),
}


def recorded(task, rule=RULES["sgd"], order=ORDER, steps=(0, 5, 12, 20)):
    return list(train_and_record(task, rule, order, steps))


def run_of(checkpoints):
    return Trajectory.from_checkpoints(checkpoints)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_is_repeated_is_met_up_to_rounding(rule):
    task = classifier()
    got = replay(task, run_of(recorded(task, RULES[rule])), ORDER)
    assert got.step.values.tolist() == [0, 5, 12]
    assert got.updates.values.tolist() == [5, 7, 8]
    assert (got.miss < 1e-10).all()
    assert (got.loss_miss < 1e-8).all()
    assert got.attrs["verdict"].startswith("the replay repeats the run")
    assert got.attrs["omitted"] == "{}"


def test_the_distance_is_relative_to_what_the_window_changes_and_over_updated_parameters_only():
    """The recorded end is moved by a tenth of the way; what is not updated lies elsewhere and does not count."""
    head = ParameterGroup(("2.weight", "2.bias"), 0.3)
    task = classifier()
    start, end = recorded(task, replace(RULES["sgd"], groups=(head,)), BatchOrder(60), (0, 10))
    params = {n: w + 0.1 * (w - start.params[n]) + (5.0 if n.startswith("0.") else 0) for n, w in end.params.items()}
    got = replay(task, run_of([start, replace(end, params=params)]))
    np.testing.assert_allclose(got.miss, 0.1 / 1.1, rtol=1e-9)
    assert "misses the run by 9.1 % of what these 10 updates change" in got.verdict.item()
    assert got.attrs["verdict"] == "the replay misses the run by 9.1 % of what the window changes"


def test_query_losses_are_compared_by_their_change():
    problem = Regression()
    w = np.array([1.0, -0.5, 2.0, 0.3])
    start = problem.trajectory(w, 0).load(0)
    other = problem.after(w, 12, np.ones(N)) + 0.05
    end = Checkpoint(12, {"weight": torch.from_numpy(other)[None]}, start.optimizer, learning_rates=(0.15,) * 12)
    got = replay(problem.task, run_of([start, end]))
    began, replayed, ended = (problem.query_means(v) for v in (w, problem.after(w, 12, np.ones(N)), other))
    np.testing.assert_allclose(got.loss_miss, abs(replayed - ended).max() / abs(ended - began).max(), rtol=1e-9)


def test_without_the_batches_it_is_a_like_run_and_nothing_is_claimed():
    task = classifier()
    checkpoints = recorded(task)
    got = replay(task, run_of(checkpoints))
    assert got.miss.isnull().all()
    assert set(got.verdict.values) == {"a like run, not this one: the batches are not known"}
    assert got.attrs["verdict"] == "a like run, not this one: the batches are not known"
    unknown = [replace(c, optimizer=replace(c.optimizer, batch_size=None)) for c in checkpoints]
    assert replay(task, run_of(unknown)).miss.isnull().all()
    whole = replay(task, run_of(recorded(task, order=BatchOrder(60))))
    assert (whole.miss < 1e-10).all()


def test_another_order_than_the_runs_is_found_out():
    task = classifier()
    got = replay(task, run_of(recorded(task)), BatchOrder(60, 16, seed=6))
    assert (got.miss > 0.05).all()
    assert "misses the run by" in got.attrs["verdict"]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_clipping_that_was_not_recorded_is_found_out(clip):
    task = classifier()
    checkpoints = recorded(task, replace(RULES["sgd"], clip_norm=0.1), BatchOrder(60))
    said = [replace(c, optimizer=replace(c.optimizer, clip_norm=clip)) for c in checkpoints]
    got = replay(task, run_of(said))
    assert (got.miss > 0.5).all() if clip is None else (got.miss < 1e-10).all()


def torch_run(task, schedule, last=20, steps=(0, 5, 20)):
    """AdamW with a warm-up from 0, recorded with the rate of the next update and those of the last ones."""
    model = copy.deepcopy(task.model)
    adam = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    warm = torch.optim.lr_scheduler.LambdaLR(adam, schedule)
    x, y = task.train.batch(slice(None))
    found, rates = [], []
    for step in range(last + 1):
        if step in steps:
            memory = {name: adam.state.get(p, {}) for name, p in model.named_parameters()}
            found.append(
                Checkpoint(
                    step,
                    dict(model.state_dict()),
                    Optimizer("adam", warm.get_last_lr()[0], weight_decay=0.1, decoupled=True, batch_size=0),
                    {n: m["exp_avg"] for n, m in memory.items() if m},
                    {n: m["exp_avg_sq"] for n, m in memory.items() if m},
                    learning_rates=tuple(rates),
                )
            )
            rates = []
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        rates.append(warm.get_last_lr()[0])
        adam.step()
        warm.step()
    return found


def test_recorded_learning_rates_of_a_warm_up_from_zero_are_used_and_their_lack_is_named():
    task = classifier()
    checkpoints = torch_run(task, lambda step: min(1.0, step / 8))
    got = replay(task, run_of(checkpoints))
    assert (got.miss < 1e-9).all()
    held = replay(task, run_of([replace(c, learning_rates=()) for c in checkpoints]))
    assert held.miss.values[0] == 1  # nothing moves at a rate of 0
    assert (held.miss > 0.1).all()
    assert all("learning rates were not recorded" in verdict for verdict in held.verdict.values)
    # A checkpoint was left out of the trajectory: only the last rates are known.
    thinned = replay(task, run_of([checkpoints[0], checkpoints[2]]))
    assert "learning rates were not recorded" in thinned.verdict.item()


def test_in_front_of_a_warm_up_the_next_checkpoint_says_how_groups_compare():
    task = classifier()
    groups = (ParameterGroup(("0.weight", "2.weight"), 0.3), ParameterGroup(("0.bias", "2.bias"), 0.1))
    start, end = recorded(task, replace(RULES["sgd"], groups=groups), BatchOrder(60), (0, 6))
    resting = replace(
        start.optimizer, learning_rate=0.0, groups=tuple(replace(group, learning_rate=0.0) for group in groups)
    )
    got = replay(task, run_of([replace(start, optimizer=resting), end]))
    assert got.miss.item() < 1e-10


def test_layers_in_train_mode_are_named():
    task = classifier()
    start, end = recorded(task, order=BatchOrder(60), steps=(0, 5))
    got = replay(task, run_of([start, replace(end, train_mode=("BatchNorm1d", "Dropout"))]))
    note = "trained with BatchNorm1d, Dropout in train mode; retrained in eval mode"
    assert note in got.verdict.item()
    assert note in got.attrs["verdict"]


def test_layers_in_train_mode_are_named_where_the_batches_are_not_known_too():
    task = classifier()
    start, end = recorded(task)[:2]
    got = replay(task, run_of([start, replace(end, train_mode=("Dropout",))]))
    note = "trained with Dropout in train mode; retrained in eval mode"
    assert got.attrs["verdict"] == f"a like run, not this one: the batches are not known; {note}"


def test_one_bad_checkpoint_raises_nothing_and_the_others_are_replayed():
    task = classifier()
    checkpoints = recorded(task, order=BatchOrder(60), steps=(0, 5, 12, 20, 25))
    checkpoints[1] = replace(checkpoints[1], optimizer=None)
    checkpoints[3] = replace(checkpoints[3], params={"0.weight": torch.zeros(8, 6, dtype=torch.float64)})
    calls = []
    got = replay(task, run_of(checkpoints), progress=lambda *at: calls.append(at))
    assert got.miss.notnull().values.tolist() == [True, False, False, False]
    omitted = json.loads(got.attrs["omitted"])
    assert "does not say which optimizer" in omitted["5"]
    assert "checkpoint at step 20 lacks parameter" in omitted["12"]
    assert "3 of 4 windows were not replayed" in got.attrs["verdict"]
    assert calls == [(k, 4) for k in range(1, 5)]


def test_long_windows_are_left_out_with_that_reason():
    task = classifier()
    got = replay(task, run_of(recorded(task)), ORDER, longest=7)
    assert got.miss.notnull().values.tolist() == [True, True, False]
    assert got.verdict.values[2] == "not replayed: 8 updates are more than longest=7"


def test_chosen_steps_are_replayed_and_unknown_ones_refused():
    task = classifier()
    run = run_of(recorded(task))
    assert replay(task, run, ORDER, steps=[5, 20]).step.values.tolist() == [5]
    with pytest.raises(ValueError, match="no checkpoint"):
        replay(task, run, ORDER, steps=[6])


def test_a_single_checkpoint_has_nothing_to_be_held_against():
    task = classifier()
    got = replay(task, run_of(recorded(task)[:1]))
    assert got.sizes["step"] == 0
    assert got.attrs["verdict"] == "nothing to replay: no checkpoint has another one after it"
