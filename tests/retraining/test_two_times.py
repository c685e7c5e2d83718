"""Influence in two times, against the derivative of whole runs, of their parts, and of windows."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import classifier

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.training import train_and_record
from stagewise.retraining.two_times import influence_in_time
from stagewise.retraining.unrolling import unrolled_influence
from stagewise.retraining.window_influence import window_influence
from stagewise.task import Task

ORDER = BatchOrder(60, 16, seed=5)
ASKED, BINS = [4, 6, 10], [0, 2, 4, 6, 7, 10]
RULES = {
    "SGD": Optimizer("sgd", 0.3),
    "momentum": Optimizer("sgd", 0.1, momentum=0.9),
    "Adam": Optimizer("adam", 0.02, betas=(0.8, 0.95), eps=1e-4),
}


@pytest.fixture(scope="module")
def task():
    return classifier()


def start_of(task, optimizer, order=ORDER):
    size = len(order(0))
    return Checkpoint(0, task.state(), replace(optimizer, batch_size=size if size < 60 else 0))


def in_time(task, rule="Adam", asked=ASKED, **options):
    return influence_in_time(
        task, start_of(task, RULES[rule]), ORDER, asked, **{"bins": BINS, "check": False, **options}
    )


def close(got, expected, within=1e-10):
    got, expected = np.asarray(got), np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=within * abs(expected).max())


@pytest.mark.parametrize("rule", RULES)
def test_bins_sum_to_the_derivative_of_the_whole_run_and_each_is_that_of_its_updates(task, rule):
    found, start = in_time(task, rule).value, start_of(task, RULES[rule])
    whole = unrolled_influence(task, start, ORDER, ASKED).value
    close(found.sum("trained"), whole)
    for first, stop in pairwise(BINS):
        later = [step for step in ASKED if step > first]
        during = unrolled_influence(task, start, ORDER, later, during=range(first, stop)).value
        close(found.sel(trained=first, asked=later), during)


@pytest.mark.parametrize("rule", RULES)
def test_the_last_bin_before_a_question_is_the_influence_of_that_window(task, rule):
    recorded = train_and_record(task, RULES[rule], ORDER, [7])
    window = window_influence(task, Trajectory.from_checkpoints(recorded), window=3, order=ORDER)
    close(in_time(task, rule).value.sel(trained=7, asked=10), window.value[0])


def test_what_is_trained_on_after_the_question_has_no_influence_and_no_derivative_to_grow(task):
    found = in_time(task)
    after = (found.trained >= found.asked).values
    assert not found.value.values[after].any()
    assert np.isnan(found.growth.values[after]).all()
    assert (found.growth.values[~after] > 0).all()


def test_growth_is_that_of_the_derivative_by_the_weights():
    """On a quadratic loss in one weight, gradient descent shrinks it by 1 - rate in every update."""
    x = torch.ones(4, 1, dtype=torch.float64)
    task = Task(
        torch.nn.Linear(1, 1, bias=False).double(),
        lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2 / 2,
        train=(x, x[:, 0]),
        queries={"same": (x, x[:, 0])},
    )
    start = Checkpoint(0, task.state(), Optimizer("sgd", 0.1, batch_size=0))
    found = influence_in_time(task, start, BatchOrder(4), [3, 5], bins=[0, 2, 3, 5])
    expected = [[0.9**3, 0.9**5], [0.9, 0.9**3], [np.nan, 0.9**2]]
    np.testing.assert_allclose(found.growth[..., 0], expected, rtol=1e-12)


@pytest.mark.parametrize("memory", [1, 2e4])
def test_little_memory_costs_walks_and_changes_nothing(task, memory):
    walks = []
    options = {"asked": [2, 5], "bins": [0, 1, 2, 5], "check": True}
    found = in_time(task, memory=memory, progress=lambda *now: walks.append(now), **options)
    whole = in_time(task, **options)
    for name in ("value", "growth", "miss"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-6, atol=1e-12)
    close(found.value.fillna(0), whole.value.fillna(0))
    assert len(walks) > 1
    assert walks[-1] == (len(walks), len(walks))


def test_states_on_disk_change_nothing(task, tmp_path):
    options = {"asked": [2, 5], "bins": [0, 1, 2, 5], "memory": 1}
    found, whole = in_time(task, scratch=tmp_path, **options), in_time(task, **options)
    assert found.identical(whole)
    assert not list(tmp_path.iterdir())


def test_samples_sum_to_their_groups(task):
    samples, groups = in_time(task, per="sample").value, in_time(task).value
    for label in range(3):
        close(samples[:, :, label::3].mean("train"), groups.sel(train=str(label)))


def test_bins_need_not_begin_with_the_run_nor_reach_the_question(task):
    found, whole = in_time(task, bins=[2, 4, 6], asked=[6, 10]), in_time(task)
    close(found.value, whole.value.sel(trained=[2, 4], asked=[6, 10]))


def test_default_bins_end_where_questions_are_asked(task):
    found, whole = in_time(task, bins=None), in_time(task)
    assert list(zip(found.trained.values, found.trained_stop.values, strict=True)) == [(0, 4), (4, 6), (6, 10)]
    close(found.value[2], whole.value.sel(trained=[6, 7]).sum("trained"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_stable_run_passes_its_check_in_either_precision(dtype):
    task = classifier(dtype)
    found = in_time(task, "SGD", check=True)
    assert not found.value.isnull().any()
    assert found.attrs["masked"] == ""
    assert float(found.miss.max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beyond_the_edge_of_stability_numbers_are_masked_and_it_is_said(dtype):
    task, order = classifier(dtype), BatchOrder(60)
    start = start_of(task, Optimizer("sgd", 5.0), order)
    found = influence_in_time(task, start, order, [4, 40], bins=[0, 4, 20, 36, 40])
    failed = found.value.isnull().any(("train", "query"))
    assert failed.sel(trained=0, asked=40)
    assert not failed.sel(trained=36, asked=40)
    assert (failed == (found.miss > 0.1)).all()
    assert float(found.growth.sel(trained=0, asked=40).max()) > 30
    assert found.attrs["masked"].startswith(f"{int(failed.sum())} of 5 pairs (trained, asked) are NaN")
    unmasked = influence_in_time(task, start, order, [4, 40], bins=[0, 4, 20, 36, 40], check=False)
    assert not unmasked.value.isnull().any()
    assert "miss" not in unmasked


def test_questions_and_bins_that_do_not_fit_are_refused_with_what_would(task):
    for changes, said in {
        "asked before the start": (
            {"asked": [0, 6], "bins": None},
            "asked must come after the start of the replay, step 0",
        ),
        "asked twice": ({"asked": [6, 6]}, "ascend without repeats"),
        "one edge": ({"bins": [6]}, "two edges or more"),
        "beyond the run": ({"bins": [0, 4, 6, 10, 18]}, "to the last step that is asked for, 10"),
        "cut": ({"bins": [0, 4, 10]}, r"step 6 is asked for in the middle of a bin; add 6 to bins"),
        "nothing before": ({"bins": [4, 6, 10]}, "step 4 is asked for, but bins begin at 4"),
        "no memory": ({"memory": 0}, "memory > 0"),
        "groups of samples": ({"per": "sample", "groups": [0] * 60}, "groups= are for per='group'"),
    }.values():
        with pytest.raises(ValueError, match=said):
            in_time(task, **changes)
