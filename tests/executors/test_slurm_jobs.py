"""Jobs of Slurm that reach their time limit, die, or are held back; and what they take over from a job around them."""

import os
import pickle
import subprocess
from types import SimpleNamespace

import pytest
from pretended_jobs import Jobs
from toys import Toy, written

from stagewise.run.executors import Slurm, WorkerDiedError, slurm_job
from stagewise.run.executors.base import finish
from stagewise.run.executors.board import Board
from stagewise.run.executors.local import Local
from stagewise.run.executors.share import Share
from stagewise.run.executors.slurm_job import Job

submitit = pytest.importorskip("submitit")


def test_a_job_that_comes_near_its_time_limit_is_requeued_and_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
    slurm, told = Slurm(cluster="local", jobs=1, minutes=5, poll=0.1), []
    finish(slurm.map(Toy(tmp_path, "time limit once"), range(5), None, tmp_path / "executor"), told.append)
    assert sorted(told) == [*range(5)]
    assert written(tmp_path) == dict.fromkeys(range(5), 1)
    assert (tmp_path / "tried").read_text().split() == ["once"] * 2
    jobs = [path for path in (tmp_path / "executor" / "slurm").iterdir() if path.name.isdigit()]
    assert len(jobs) == 1, "another job was submitted"


def a_share(tmp_path, cells="abc"):
    return Share(Board(tmp_path), b"", {cell: cell for cell in cells}, (), 1, 1, 0)


def test_a_job_that_has_been_requeued_too_often_says_nothing_of_its_cells(tmp_path, monkeypatch):
    def over(*_, **__):
        yield "a", None
        raise submitit.core.utils.UncompletedJobError("timed-out too many times")

    monkeypatch.setattr(Local, "map_pickled", over)
    share = a_share(tmp_path)
    with pytest.raises(submitit.core.utils.UncompletedJobError):
        share()
    assert {*share.board.told("abc")} == {"a"}


def test_workers_that_cannot_begin_again_do_not_take_back_what_is_complete(tmp_path, monkeypatch):
    def broken(*_, **__):
        yield "a", None
        raise RuntimeError("no such data")

    monkeypatch.setattr(Local, "map_pickled", broken)
    share = a_share(tmp_path)
    share()
    told = share.board.told("abc")
    assert [told[name].started for name in "abc"] == [True, False, False]
    assert told["a"].error is None


def ended(slurm, cells, tmp_path):
    return dict(slurm.map(pickle.dumps, cells, None, tmp_path))


@pytest.mark.parametrize("cpus", [1, 3])
@pytest.mark.parametrize("deadly", [0, 4, 7])
def test_a_cell_at_which_jobs_die_fails_and_neither_those_beside_it_nor_those_never_begun(
    tmp_path, monkeypatch, cpus, deadly
):
    Jobs(monkeypatch, {deadly})
    slurm, told = Slurm(jobs=1, cpus=cpus, poll=0.01), []
    ends = ended(slurm, range(8), tmp_path)
    assert {cell for cell, error in ends.items() if error} == {deadly}
    assert isinstance(ends[deadly], WorkerDiedError)
    with pytest.raises(RuntimeError, match="1 cells failed and 7 are complete"):
        finish(slurm.map(pickle.dumps, range(8), None, tmp_path / "again"), told.append)


@pytest.mark.parametrize(("at_once", "most"), [(True, 3), (False, 8)])
def test_where_every_job_dies_it_ends_after_a_few_of_them(tmp_path, monkeypatch, at_once, most):
    jobs = Jobs(monkeypatch, range(100), at_once)
    with pytest.raises(WorkerDiedError, match="killed"):
        finish(Slurm(jobs=1, cpus=3, poll=0.01).map(pickle.dumps, range(100), None, tmp_path), print)
    assert jobs.submitted <= most


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A file: what Slurm says of every job that is asked for."""
    said, sacct = tmp_path / "state", tmp_path / "bin" / "sacct"
    sacct.parent.mkdir()
    sacct.write_text(f'#!/bin/sh\necho "JobID|State|NodeList"\necho "7|$(cat {said})|here"\n')
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sacct.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(submitit.SlurmJob, "watcher", type(submitit.SlurmJob.watcher)(delay_s=0))
    return said


def job(tmp_path):
    return Job.of(submitit.SlurmJob(tmp_path / "%j", "7"), set())


@pytest.mark.parametrize("held", ["SUSPENDED", "CONFIGURING", "REQUEUE_HOLD", "PENDING", "PREEMPTED"])
def test_a_job_that_is_held_back_is_waited_for_and_seen_to_end(tmp_path, state, held):
    waiting = job(tmp_path)
    for said, over in [(held, False), (held, False), ("RUNNING", False), ("CANCELLED by 1000", True)]:
        state.write_text(said)
        assert waiting.over() == over, said


def test_a_job_that_was_preempted_and_is_not_requeued_is_not_waited_for_for_ever(tmp_path, state, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(slurm_job, "time", SimpleNamespace(monotonic=lambda: now[0]))
    cancelled = job(tmp_path)
    for minute, said, over in [(0, "PREEMPTED", False), (1, "PENDING", False), (9, "PREEMPTED", False)]:
        now[0] = 60.0 * minute
        state.write_text(said)
        assert cancelled.over() == over
    now[0] += 310.0
    assert cancelled.over()


def test_a_job_that_is_submitted_within_another_takes_over_nothing_of_it(tmp_path, monkeypatch):
    seen = {}

    def start(*_, **__):
        seen.update(os.environ)
        return subprocess.Popen(["true"])

    monkeypatch.setattr("submitit.local.local.start_controller", start)
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SLURM_CPU_BIND"):
        monkeypatch.setenv(name, "1")
    (made,) = Slurm(cluster="local", jobs=4)._submitted(Board(tmp_path), print, {"a": 1}, set(), None)
    while not made.over():
        pass
    assert seen
    assert not [name for name in seen if name.startswith("SLURM_")]
    assert os.environ["SLURM_MEM_PER_NODE"] == "1"


@pytest.mark.parametrize(("given", "workers", "shape"), [({}, None, 8), ({}, 6, 2), ({"jobs": 16}, 1, 16)])
def test_as_many_jobs_as_are_given_are_submitted_whatever_the_number_of_workers(given, workers, shape):
    assert Slurm(cpus=4, **given).shape(workers) == (shape, 4, 1)
