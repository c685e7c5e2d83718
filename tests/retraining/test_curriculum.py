"""Weights for the next window: the best there are to first order, and found in a loop that goes on as it would have."""

import numpy as np
import pytest
import torch
from problems import Regression, classifier
from scipy.optimize import linprog

import stagewise as sw
from stagewise.checkpoint import CheckpointError
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.training import train_and_record

SIZES = (4, 10, 6, 25, 15)
LABELS = np.repeat(list("abcde"), SIZES)
WINDOW = 6
ADAM = sw.Optimizer("adam", 0.02, betas=(0.8, 0.95), eps=1e-4)


def checkpoint(task, order, step=10):
    (found,) = train_and_record(task, ADAM, order, [step])
    return found


@pytest.mark.parametrize(("budget", "most"), [(0.5, 2.0), (0.1, 1.5), (1.0, 30.0), (1.0, 1.01)])
def test_no_weights_of_mean_one_within_the_bounds_lower_the_query_more_to_first_order(budget, most):
    task = classifier()
    start = checkpoint(task, BatchOrder(60))
    exact = sw.window_influence(
        task, sw.Trajectory.from_checkpoints([start]), window=WINDOW, groups=LABELS, queries=["1"]
    )
    values = np.repeat(exact.value.values[0, :, 0], SIZES)
    best = linprog(values, A_eq=np.ones((1, 60)), b_eq=[60], bounds=(1 - budget, most))
    weights = sw.curriculum(task, start, "1", window=WINDOW, budget=budget, most=most, groups=LABELS)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert weights.min() >= 1 - budget - 1e-6
    assert weights.max() <= most + 1e-6
    assert all(len(set(weights[label == LABELS].tolist())) == 1 for label in "abcde")
    assert values @ weights.double().numpy() == pytest.approx(best.fun, rel=1e-6)


def test_training_with_the_weights_lowers_the_query_by_what_influence_predicts_and_the_opposite_raises_it():
    task, order = classifier(), BatchOrder(60)
    start = checkpoint(task, order)
    weights = sw.curriculum(task, start, "2", window=WINDOW, budget=0.02, per="sample", most=1.05).double()
    ways = [Schedule(), *(Schedule.of_weights(w, start.step, WINDOW) for w in (weights, 2 - weights))]
    losses = sw.retrain(task, start, ways, order, [start.step + WINDOW]).sel(query="2").values[0]
    run = sw.Trajectory.from_checkpoints([start])
    exact = sw.window_influence(task, run, window=WINDOW, per="sample", queries=["2"]).value.values[0, :, 0]
    predicted = exact @ (weights.numpy() - 1)
    with_them, against_them = losses[1:] - losses[0]
    assert with_them < 0 < against_them
    assert (with_them - against_them) / 2 == pytest.approx(predicted, rel=0.01)  # second order is alike in both


def test_a_loop_that_asks_for_weights_is_not_disturbed_and_a_snapshot_is_what_the_recorder_would_have_written(tmp_path):
    def trained(asks):
        task = classifier()
        model, order, heard = task.pure.reference({}), BatchOrder(60, 16, seed=3), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        record = sw.Recorder(tmp_path / str(asks), model, optimizer, range(9), batch_size=16)
        for step in range(9):
            record(step)
            if asks and step % 4 == 0:
                now = sw.snapshot(step, model, optimizer, batch_size=16)
                heard.append(sw.curriculum(task, now, "0", window=4, per="sample", repeats=2))
            batch = task.train.batch(order(step))
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
        return task, model.state_dict(), heard

    (task, asked, heard), (_, left_alone, _) = trained(asks=True), trained(asks=False)
    assert all(torch.equal(asked[name], left_alone[name]) for name in asked)
    run = sw.Trajectory.from_directory(tmp_path / "True")
    again = [sw.curriculum(task, run.load(step), "0", window=4, per="sample", repeats=2) for step in (0, 4, 8)]
    assert all(torch.equal(first, second) for first, second in zip(heard, again, strict=True))
    assert not torch.equal(heard[0], heard[1])


def test_batches_to_come_that_a_recorded_run_knows_are_not_used():
    task, order = classifier(), BatchOrder(60, 16, seed=3)
    start = checkpoint(task, order)
    known = start.followed_by((), [order(start.step + k) for k in range(WINDOW)])
    a, b = (sw.curriculum(task, one, "0", window=WINDOW, per="group") for one in (start, known))
    assert torch.equal(a, b)


def test_what_is_in_no_group_or_no_candidate_keeps_weight_one():
    task = classifier()
    start = checkpoint(task, BatchOrder(60))
    some = [None if label == "a" else label for label in LABELS]
    weights = sw.curriculum(task, start, "0", window=2, groups=some)
    assert set(weights[LABELS == "a"].tolist()) == {1.0}
    assert weights[LABELS != "a"].mean().item() == pytest.approx(1)
    assert (weights[LABELS != "a"] != 1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "0 < budget <= 1"),
        ({"budget": 1.1}, "0 < budget <= 1"),
        ({"most": 1.0}, "most > 1"),
        ({"most": float("nan")}, "most > 1"),
        ({"window": 0}, "window >= 1"),
        ({"query": "nobody"}, "no group is called .'nobody'."),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(options, message):
    task = classifier()
    start = checkpoint(task, BatchOrder(60))
    query = options.pop("query", "0")
    with pytest.raises(ValueError, match=message) as caught:
        sw.curriculum(task, start, query, **{"window": 2, **options})
    assert "\n" not in str(caught.value)


def test_a_run_in_place_of_a_checkpoint_is_refused_with_what_to_pass():
    task = classifier()
    run = sw.Trajectory.from_checkpoints([checkpoint(task, BatchOrder(60))])
    with pytest.raises(TypeError, match=r"got Trajectory; use run.load\(step\), or snapshot"):
        sw.curriculum(task, run, "0", window=2)


def test_influence_that_is_not_finite_gives_no_weights():
    task = Regression().task
    wild = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 1e200, batch_size=0))
    with pytest.raises(ValueError, match="finite"):
        sw.curriculum(task, wild, "a", window=3)


def test_snapshots_of_optimisers_that_cannot_be_repeated_are_refused():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(CheckpointError, match="RMSprop is none of"):
        sw.snapshot(0, model, torch.optim.RMSprop(model.parameters()))
    with pytest.raises(CheckpointError, match="was it made for another"):
        sw.snapshot(0, model, torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="number of updates made so far, got -1"):
        sw.snapshot(-1, model, torch.optim.SGD(model.parameters(), lr=0.1))
