"""Who computes the cells of a run: nobody where nothing is missing, this process, or an executor."""

import traceback
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from stagewise.run.crew import Crew
from stagewise.run.executors import CellsFailedError, Local, Ray, Slurm
from stagewise.run.progress import silent


class Toy(NamedTuple):
    """A cell."""

    step: int
    stage: str = "toy"


CELLS = [Toy(step) for step in range(5)]
CPU = SimpleNamespace(device=torch.device("cpu"))


class ToyWork:
    """Some cells raise the errors that are given for them, one after another, and then are computed.

    What each try held is remembered in ``held``, and how many of them were alive when it began in ``alive``.
    """

    def __init__(self, root, errors=()):
        self.store, self.errors = SimpleNamespace(root=root), {step: [*found] for step, found in dict(errors).items()}
        self.complete, self.tried, self.held, self.alive = set(), [], [], []

    def is_complete(self, cell):
        return cell in self.complete

    def compute(self, _task, cell, _progress):
        self.alive.append(sum(array() is not None for array in self.held))
        traces = np.zeros(3)
        self.held.append(weakref.ref(traces))
        self.tried.append(cell.step)
        if self.errors.get(cell.step):
            raise self.errors[cell.step].pop(0)
        self.complete.add(cell)


def crew(work, executor=None, workers=1, task=CPU):
    return Crew(work, task, executor, workers, silent)


def blips(count):
    return [OSError(f"no such file {number}") for number in range(count)]


@pytest.mark.parametrize("bad", [0, 1, 4])
def test_one_process_alone_goes_on_beside_a_cell_that_fails_and_names_it(tmp_path, bad):
    work = ToyWork(tmp_path, {bad: blips(9)})
    with pytest.raises(CellsFailedError, match=f"(?s)1 cells failed and 4 are complete.*step={bad}.*no such file"):
        crew(work).compute(CELLS)
    assert work.complete == {cell for cell in CELLS if cell.step != bad}
    assert work.tried.count(bad) == 3


def test_a_failure_that_does_not_come_again_is_no_failure_in_one_process(tmp_path):
    work = ToyWork(tmp_path, {1: blips(2)})
    crew(work).compute(CELLS)
    assert sorted(work.tried) == [0, 1, 1, 1, 2, 3, 4]
    work = ToyWork(tmp_path, {1: blips(1)})
    with pytest.raises(CellsFailedError):
        crew(work, Local(retries=0)).compute(CELLS)


def test_the_same_run_again_does_not_end_at_the_cell_at_which_it_ended_before(tmp_path):
    work = ToyWork(tmp_path, {1: [ValueError("refused")]})
    work.complete.add(CELLS[0])
    with pytest.raises(CellsFailedError, match="refused"):
        crew(work).compute(CELLS)
    assert work.tried == [1, 2, 3, 4]


def test_where_nothing_can_be_computed_a_run_ends_after_a_few_cells(tmp_path):
    work = ToyWork(tmp_path, {step: blips(9) for step in range(100)})
    with pytest.raises(OSError, match="no such file"):
        crew(work).compute([Toy(step) for step in range(100)])
    assert len(work.tried) <= 6


def test_what_a_failed_cell_held_is_free_before_the_next_one_begins(tmp_path):
    work = ToyWork(tmp_path, {1: blips(9)})
    with pytest.raises(CellsFailedError) as failed:
        crew(work).compute(CELLS)
    assert work.alive == [0] * len(work.tried)
    assert "in compute" in "".join(traceback.format_exception(failed.value.__cause__)), "where it was raised is lost"


@pytest.mark.parametrize("executor", [None, Local(), Ray(), Slurm(cluster="local")])
@pytest.mark.parametrize("workers", [0, -1])
def test_a_run_without_workers_is_refused_and_not_waited_for_for_ever(tmp_path, executor, workers):
    with pytest.raises(ValueError, match=f"workers must be at least 1, got {workers}"):
        crew(ToyWork(tmp_path), executor, workers)


@pytest.mark.parametrize("executor", [Ray(address="nowhere:1"), Slurm()])
def test_a_run_that_is_complete_asks_for_no_cluster(tmp_path, executor):
    work = ToyWork(tmp_path)
    work.complete.update(CELLS)
    crew(work, executor).compute(CELLS)


@pytest.mark.parametrize("executor", [Ray(address="nowhere:1"), Slurm()])
def test_a_task_on_a_gpu_is_not_given_to_workers_that_have_none(tmp_path, executor):
    task = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"task is on cuda:0, .*executor\.gpus"):
        crew(ToyWork(tmp_path), executor, None, task).compute(CELLS)
