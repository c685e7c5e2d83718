"""Runs in memory, and what may stand for a run."""

from pathlib import Path

import pytest
import torch
from small_runs import tensors

from stagewise.checkpoints import Checkpoint, Optimizer, Trajectory, as_trajectory, write_checkpoint


def test_two_different_checkpoints_of_one_step_are_refused_instead_of_the_last_winning():
    same = [Checkpoint(1, tensors(0)), Checkpoint(2, tensors(1)), Checkpoint(1, tensors(0))]
    assert Trajectory.from_checkpoints(same).steps == (1, 2)
    for other in (
        Checkpoint(1, tensors(3)),
        Checkpoint(1, tensors(0), Optimizer("sgd", 0.1)),
        Checkpoint(1, tensors(0), first_moment=tensors(1)),
    ):
        with pytest.raises(ValueError, match="two different checkpoints are of step 1"):
            Trajectory.from_checkpoints([*same, other])


def test_one_and_the_same_checkpoint_twice_is_one():
    checkpoint = Checkpoint(1, tensors())
    assert Trajectory.from_checkpoints([checkpoint, checkpoint]).load(1) is checkpoint


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_stands_for_the_run_in_its_folder(tmp_path, kind):
    write_checkpoint(tmp_path, Checkpoint(3, tensors()))
    run = as_trajectory(kind(tmp_path))
    assert run.steps == (3,)
    assert torch.equal(run.load(3).params["scale"], tensors()["scale"])


def test_a_run_in_a_folder_beside_this_process_is_found_from_another_one_too(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", Checkpoint(3, tensors()))
    monkeypatch.chdir(tmp_path)
    run = as_trajectory("run")
    monkeypatch.chdir("/")
    assert run.load(3).step == 3


def test_a_trajectory_stands_for_itself():
    run = Trajectory.from_checkpoints([Checkpoint(1, tensors())])
    assert as_trajectory(run) is run


@pytest.mark.parametrize("source", [[], {}, None, 3, [Checkpoint(1, {})]])
def test_what_is_no_run_is_named_and_the_way_for_checkpoints_in_memory_too(source):
    with pytest.raises(TypeError, match=rf"got {type(source).__name__}; .*from_checkpoints"):
        as_trajectory(source)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of checkpoints"):
        as_trajectory(str(tmp_path / "nowhere"))
