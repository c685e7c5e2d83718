"""The digits study has the same bits wherever its cells are computed, and whatever is killed meanwhile."""

import os
import signal
from contextlib import suppress

import psutil
import pytest
from small_digits import complete, contents, recorded, start, until

from stagewise.run.executors import Local, Ray, Slurm
from stagewise.run.pipeline import merge, run
from stagewise.run.slices import Slice
from stagewise.run.status import status

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def digits(tmp_path_factory, no_pictures):
    """The configuration, and the folder of its run by two processes of this machine that nobody disturbed."""
    config = recorded(tmp_path_factory.mktemp("digits"))
    run(config.model_copy(update={"executor": Local(threads=1)}))
    return config


def elsewhere(config, folder, executor):
    return config.model_copy(update={"out": folder / "run", "executor": executor})


def killed(process):
    """A driver that is killed outright, with nothing that it could say."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def finished(process, config, before):
    """The driver has come to its end, and what was complete is as it was."""
    process.join(300)
    assert process.exitcode == 0
    now = complete(config.out)
    assert {path: now[path] for path in before} == before
    found = status(config.out)
    assert not found.missing
    assert found.reported
    assert not found.at_work


def test_on_ray_where_a_worker_a_node_and_the_driver_are_lost(tmp_path, digits, two_nodes):
    config = elsewhere(digits, tmp_path, Ray())
    driver = start(config, tmp_path / "first.log")
    until(config.out, 2)
    workers = [p for p in psutil.process_iter(["cmdline"]) if "ray::_work_on" in " ".join(p.info["cmdline"] or [])]
    assert workers
    workers[0].kill()
    until(config.out, 5)
    two_nodes.lose()
    before = until(config.out, 8)
    killed(driver)
    before = complete(config.out) | before
    again = start(config, tmp_path / "second.log")
    finished(again, config, before)
    assert contents(config.out) == contents(digits.out)
    # The second driver has begun with what the first one left.
    first_words = (tmp_path / "second.log").read_text().splitlines()[0]
    assert first_words.split()[0] == "sampling"
    assert int(first_words.split()[1]) >= sum(path.suffix == ".zip" for path in before)


def test_in_jobs_of_submitit_where_a_job_and_the_driver_are_killed(tmp_path, digits):
    config = elsewhere(digits, tmp_path, Slurm(cluster="local", jobs=2, poll=0.1))
    driver = start(config, tmp_path / "first.log")
    until(config.out, 2)
    jobs = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert jobs
    with suppress(psutil.NoSuchProcess):
        jobs[-1].kill()
    before = until(config.out, 6)
    killed(driver)
    before = complete(config.out) | before
    finished(start(config, tmp_path / "second.log"), config, before)
    assert contents(config.out) == contents(digits.out)


def test_in_four_slices_that_are_merged_where_one_is_killed_and_run_again(tmp_path, digits):
    config = elsewhere(digits, tmp_path, Local(threads=1)).model_copy(update={"workers": 1})
    second = start(config, tmp_path / "second.log", Slice(2, 4))
    before = until(config.out, 1)
    killed(second)
    first, third = (start(config, tmp_path / "log", Slice(number, 4)) for number in (1, 3))
    for process in (first, third):
        process.join(300)
        assert process.exitcode == 0
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ cells: sampling at step .*`stagewise run"):
        merge(config.out)
    for number in (2, 4):
        process = start(config, tmp_path / "log", Slice(number, 4))
        process.join(300)
        assert process.exitcode == 0
    assert not status(config.out).missing
    assert not status(config.out).reported
    merge(config.out)
    assert status(config.out).reported
    now = complete(config.out)
    assert {path: now[path] for path in before} == before
    assert contents(config.out) == contents(digits.out)
