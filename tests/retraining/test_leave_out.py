import numpy as np
import pytest
import torch
from problems import LABELS, D, N, Regression, classifier, squared_error

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.dynamics.curves import curves
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.leave_out import leave_out, retrain
from stagewise.retraining.schedule import BatchOrder, Change, Schedule
from stagewise.retraining.scores import measured_influence, predicted_effect
from stagewise.retraining.training import train_and_record
from stagewise.task import Task

W = np.array([1.0, -0.5, 2.0, 0.3])
ORDER = BatchOrder(60, 16, seed=5)


def start_of(problem, step=0):
    return problem.trajectory(W, step).load(step)


def recorded(task, *steps):
    return list(train_and_record(task, Optimizer("adam", 0.01), ORDER, steps))


def alone(checkpoint):
    return Trajectory.from_checkpoints([checkpoint])


@pytest.mark.parametrize("weight", [0.0, 0.8, 2.0])
def test_groups_are_changed_at_every_update_and_looked_at_along_the_way(weight):
    problem, steps = Regression(), [0, 3, 40]
    got = leave_out(problem.task, start_of(problem), BatchOrder(N), steps, weight=weight)
    for step in steps:
        unchanged = problem.query_means(problem.after(W, step, np.ones(N)))
        np.testing.assert_allclose(got.loss.sel(step=step), unchanged, rtol=1e-10)
        for label in "abc":
            changed = problem.query_means(problem.after(W, step, np.where(label == LABELS, weight, 1.0)))
            np.testing.assert_allclose(
                got.effect.sel(step=step, train=label), changed - unchanged, rtol=1e-9, atol=1e-13
            )


def test_a_sample_without_a_group_label_is_left_out_alone():
    problem = Regression(train_groups=None)
    got = leave_out(problem.task, start_of(problem), BatchOrder(N), [12])
    assert got.sizes["train"] == N
    without = problem.after(W, 12, np.where(np.arange(N) == 11, 0.0, 1.0))
    expected = problem.query_means(without) - problem.query_means(problem.after(W, 12, np.ones(N)))
    np.testing.assert_allclose(got.effect.sel(step=12, train="11"), expected, rtol=1e-9)


def test_the_result_has_the_form_of_a_window_ablation_so_that_both_go_to_the_same_places():
    task = classifier()
    (start,) = recorded(task, 10)
    order = BatchOrder(60, 16, seed=1)
    window = window_ablation(task, alone(start), window=6, order=order, weight=0.5)
    whole = leave_out(task, start, order, [16], weight=0.5)
    assert whole.effect.dims == window.effect.dims
    assert set(whole.coords) == set(window.coords)
    assert set(window.attrs) - set(whole.attrs) == {"window", "repeats", "batches", "omitted"}
    assert whole.effect.attrs == window.effect.attrs
    # A window that is as long as the run is the whole run.
    np.testing.assert_allclose(whole.effect[0], window.effect[0], rtol=1e-10)


def test_windows_swept_over_the_run_are_seen_at_their_ends_and_at_fixed_later_steps():
    task = classifier()
    checkpoints = recorded(task, 0, 10, 20)
    windows = [Schedule(), *(Schedule.window(range(0, 60, 3), c.step, 10, 0.0) for c in checkpoints)]
    losses = retrain(task, checkpoints[0], windows, ORDER, [10, 20, 30, 45])
    effect = losses - losses.sel(replay=0)
    for replay, checkpoint in enumerate(checkpoints, start=1):
        at_end = window_ablation(task, alone(checkpoint), window=10, order=ORDER, weight=0.0, groups=np.arange(60) % 3)
        here = effect.sel(replay=replay, step=checkpoint.step + 10)
        np.testing.assert_allclose(here, at_end.effect.sel(train="0")[0], rtol=1e-8)
        assert not effect.sel(replay=replay, step=slice(0, checkpoint.step)).values.any()
        assert abs(effect.sel(replay=replay, step=45)).min() > 1e-6  # the effect of the window outlives it


def test_a_run_may_have_several_changes_and_changes_may_hold_for_the_whole_run():
    problem = Regression()
    beta = np.where(np.arange(N) < 4, 0.0, 1.0)
    split = Schedule((Change(0, 5, torch.arange(4), 0.0), Change(5, 12, torch.arange(4), 0.0)))
    runs = [Schedule.whole_run(range(4), 0.0), split, Schedule.whole_run([], 0.0)]
    got = retrain(problem.task, start_of(problem), runs, BatchOrder(N), [12])
    expected = problem.query_means(problem.after(W, 12, beta))
    np.testing.assert_allclose(got[0, 0], expected, rtol=1e-10)
    np.testing.assert_allclose(got[0, 1], expected, rtol=1e-10)
    np.testing.assert_allclose(got[0, 2], problem.query_means(problem.after(W, 12, np.ones(N))), rtol=1e-10)


def test_small_stacks_and_loops_give_the_runs_of_one_stack_in_order():
    task, calls = classifier(), []
    (start,) = recorded(task, 10)
    runs = [Schedule.whole_run(range(k), 0.0) for k in range(7)]
    whole = retrain(task, start, runs, ORDER, [10, 18])
    parts = retrain(task, start, runs, ORDER, [10, 18], max_replays=3, progress=lambda *at: calls.append(at))
    loop = retrain(task, start, runs, ORDER, [10, 18], max_replays=1, batching="loop")
    np.testing.assert_allclose(parts, whole, rtol=1e-10)
    np.testing.assert_allclose(loop, whole, rtol=1e-10)
    assert calls == [(3, 7), (6, 7), (7, 7)]
    assert whole.dims == ("step", "replay", "query")
    assert whole.step.values.tolist() == [10, 18]

    effects = leave_out(task, start, ORDER, [18], groups=np.arange(60) % 7)
    in_parts = leave_out(task, start, ORDER, [18], groups=np.arange(60) % 7, max_replays=3)
    np.testing.assert_allclose(in_parts.effect, effects.effect, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("steps", [[], [9, 12], [12, 11], [12, 12]])
def test_steps_that_cannot_be_reached_in_order_are_refused(steps):
    problem = Regression()
    for call in (
        lambda: retrain(problem.task, start_of(problem, 10), [Schedule()], BatchOrder(N), steps),
        lambda: leave_out(problem.task, start_of(problem, 10), BatchOrder(N), steps),
    ):
        with pytest.raises(ValueError, match=r"ascend without repeats from .* step 10, got \["):
            call()


def test_no_runs_no_room_for_runs_and_another_model_are_refused():
    problem = Regression()
    start = start_of(problem)
    with pytest.raises(ValueError, match="one schedule or more"):
        retrain(problem.task, start, [], BatchOrder(N), [3])
    with pytest.raises(ValueError, match="max_replays >= 2"):
        leave_out(problem.task, start, BatchOrder(N), [3], max_replays=1)
    other = problem.trajectory(np.zeros(D + 1), 0).load(0)
    with pytest.raises(CheckpointError, match="shape"):
        retrain(problem.task, other, [Schedule()], BatchOrder(N), [3])
    with pytest.raises(ValueError, match="does not say which optimizer"):
        retrain(problem.task, Checkpoint(0, start.params), [Schedule()], BatchOrder(N), [3])


def test_measured_influence_is_the_influence_whose_predicted_effect_was_measured():
    problem = Regression()
    effects = leave_out(problem.task, start_of(problem), BatchOrder(N), [0, 5, 9], weight=0.7)
    influence = measured_influence(effects)
    predicted = predicted_effect(influence, weight=0.7)
    np.testing.assert_allclose(predicted.effect, effects.effect, rtol=1e-12)
    assert not influence.stderr.values.any()
    assert influence.attrs["sign"].startswith("negative = helpful")
    assert curves(influence).lower.dims == ("step", "train", "query")


def test_measured_influence_is_negative_where_training_on_the_data_helps():
    problem = Regression()
    data = problem.task.train
    same = Task(problem.task.model, squared_error, train=data, queries={"train": data}, train_groups=LABELS)
    for weight in (0.5, 1.5):
        effects = leave_out(same, start_of(problem), BatchOrder(N), [3], weight=weight)
        assert (measured_influence(effects).value < 0).all()


def test_the_measured_standard_error_is_per_sample_and_per_unit_weight_too():
    task = classifier()
    (start,) = recorded(task, 10)
    got = window_ablation(task, alone(start), window=5, repeats=3, weight=0.8)
    np.testing.assert_allclose(measured_influence(got).stderr, got.effect_stderr / (20 * 0.2), rtol=1e-10)


def test_effects_of_no_change_and_effects_without_a_weight_are_refused():
    problem = Regression()
    effects = leave_out(problem.task, start_of(problem), BatchOrder(N), [3]).assign_attrs(weight=1.0)
    with pytest.raises(ValueError, match="weight 1"):
        measured_influence(effects)
    with pytest.raises(ValueError, match=r"lack \['train_size', 'weight'\]"):
        measured_influence(effects.drop_vars("train_size").drop_attrs())


def test_a_weight_of_one_is_refused_because_it_measures_nothing():
    problem = Regression()
    with pytest.raises(ValueError, match="nothing is changed; use another"):
        leave_out(problem.task, start_of(problem), BatchOrder(N), [3], weight=1.0)


def test_effects_of_a_run_whose_learning_rate_changed_are_differences_of_such_runs():
    task = classifier()
    (start,) = recorded(task, 10)
    options = {"learning_rate": lambda step: 0.05 / step}
    got = leave_out(task, start, ORDER, [15, 30], **options)
    runs = [Schedule(), *(Schedule.whole_run(range(k, 60, 3), 0.0) for k in range(3))]
    losses = retrain(task, start, runs, ORDER, [15, 30], **options).values
    np.testing.assert_allclose(got.loss, losses[:, 0], rtol=1e-10)
    np.testing.assert_allclose(got.effect, losses[:, 1:] - losses[:, :1], rtol=1e-8)
    held = leave_out(task, start, ORDER, [15, 30])
    assert not np.allclose(held.effect, got.effect, rtol=0.1)
