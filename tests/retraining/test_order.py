"""The batches that are given, held against what the checkpoint says of those it was trained with."""

import json
from dataclasses import replace

import pytest
import torch
from problems import classifier

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.leave_out import leave_out, retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.two_times import influence_in_time
from stagewise.retraining.unrolling import unroll, unrolled_influence
from stagewise.retraining.window_influence import window_influence

N = 60
CALLS = {
    "window_ablation": lambda task, start, order: window_ablation(
        task, Trajectory.from_checkpoints([start]), window=1, order=order
    ),
    "retrain": lambda task, start, order: retrain(task, start, [Schedule()], order, [1]),
    "leave_out": lambda task, start, order: leave_out(task, start, order, [1]),
    "unroll": lambda task, start, order: unroll(task, start, [Schedule()], order, [1]),
    "unrolled_influence": lambda task, start, order: unrolled_influence(task, start, order, [1]),
    "window_influence": lambda task, start, order: window_influence(
        task, Trajectory.from_checkpoints([start]), window=1, order=order
    ),
    "influence_in_time": lambda task, start, order: influence_in_time(task, start, order, [1]),
}


def start_of(task, batch_size):
    return Checkpoint(0, task.state(), Optimizer("sgd", 0.1, batch_size=batch_size))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("order", "batch_size", "message"),
    [
        (BatchOrder(50, 16), 16, r"order is of 50 samples, but there are 60 training samples; pass BatchOrder\(60"),
        (lambda _: torch.arange(45, 61), 16, r"order\(0\) names sample 60, expected indices from 0 to 59"),
        (lambda _: torch.arange(-1, 15), 16, r"order\(0\) names sample -1"),
        (BatchOrder(N, 8), 16, r"order\(0\) has 8 samples, .* step 0 was trained with 16 per update"),
        (BatchOrder(N), 16, r"has 60 samples, .* trained with 16 per update"),
        (BatchOrder(N, 16), 0, r"has 16 samples, .* trained with all 60 per update"),
        (BatchOrder(N, 16), 100, r"has 16 samples, .* trained with 100 per update"),
    ],
)
def test_batches_of_another_run_are_refused_and_not_silently_trained_on(call, order, batch_size, message):
    task = classifier()
    with pytest.raises(ValueError, match=message):
        CALLS[call](task, start_of(task, batch_size), order)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("order", "batch_size"),
    [
        (BatchOrder(N, 16), 16),
        (BatchOrder(N, 16), None),
        (BatchOrder(N), 0),
        (BatchOrder(N, 100), 0),
        (BatchOrder(N), 100),
        (lambda _: torch.arange(20, 36), 16),
    ],
)
def test_the_runs_own_batches_are_accepted_however_a_full_batch_is_written(call, order, batch_size):
    task = classifier()
    CALLS[call](task, start_of(task, batch_size), order)


def test_a_window_swept_over_checkpoints_of_changing_batch_size_holds_the_order_against_each():
    task = classifier()
    first = start_of(task, 16)
    second = replace(first, step=5, optimizer=replace(first.optimizer, batch_size=32))
    trajectory = Trajectory.from_checkpoints([first, second])
    got = window_ablation(task, trajectory, window=1, order=BatchOrder(N, 16))
    assert got.step.values.tolist() == [0]
    assert "the checkpoint at step 5 was trained with 32" in json.loads(got.attrs["omitted"])["5"]
    assert window_ablation(task, trajectory, window=1).step.values.tolist() == [0, 5]
