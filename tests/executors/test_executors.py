"""What becomes of cells whose workers die, fail or cannot begin, on every executor."""

import os
import re
import subprocess
import sys

import pytest
from toys import NoModule, Nothing, Toy, written

from stagewise.run.executors import CellsFailedError, Local, Slurm, WorkerDiedError
from stagewise.run.executors.base import finish
from stagewise.run.executors.local import gpus

CELLS = list(range(8))
UNGUARDED = """
from pathlib import Path

from stagewise.run.executors import Local

with Path(__file__).with_name("begun").open("a") as file:
    file.write(".")


class Toy:
    def __call__(self):
        return print


print(*Local().map(Toy(), [0, 1], 2))
"""


def computed(executor, setup, tmp_path, cells=CELLS):
    told = []
    finish(executor.map(setup, cells, 2, tmp_path / "executor"), told.append)
    return told


@pytest.fixture(params=["local", "ray", "slurm"])
def executor(request, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
    if request.param == "ray":
        request.getfixturevalue("two_nodes")
        from stagewise.run.executors import Ray

        return Ray()
    return Local() if request.param == "local" else Slurm(cluster="local", jobs=1, cpus=2, poll=0.1)


def test_every_cell_is_computed_once_and_told_once_beside_one_whose_worker_was_killed(executor, tmp_path):
    assert sorted(computed(executor, Toy(tmp_path, "killed once"), tmp_path)) == CELLS
    assert written(tmp_path) == dict.fromkeys(CELLS, 1)
    assert (tmp_path / "tried").read_text().split() == ["once"] * 2


def test_a_worker_that_cannot_begin_ends_all_with_its_own_message(executor, tmp_path):
    with pytest.raises(ValueError, match="no such data"):
        computed(executor, Toy(tmp_path, "setup"), tmp_path)
    assert not written(tmp_path)


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        ("killed", 3, "3: a worker process was killed"),
        ("error", 3, "3: RuntimeError: three is bad"),
        ("refused", 1, "3: three is refused"),
    ],
)
def test_a_cell_that_fails_is_tried_a_bounded_number_of_times_and_named_and_the_rest_finished(
    tmp_path, fault, tries, message
):
    with pytest.raises(CellsFailedError, match=f"(?s)1 cells failed and 7 are complete.*{message}"):
        computed(Local(), Toy(tmp_path, fault), tmp_path)
    assert written(tmp_path) == dict.fromkeys([cell for cell in CELLS if cell != 3], 1)
    assert len((tmp_path / "tried").read_text().split()) == tries


def test_an_error_that_does_not_come_again_costs_one_more_try(tmp_path):
    assert sorted(computed(Local(), Toy(tmp_path, "error once"), tmp_path)) == CELLS


def test_a_module_that_is_missing_in_the_workers_is_named_at_once(tmp_path):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        computed(Local(), NoModule(), tmp_path)


def test_what_workers_cannot_be_sent_or_do_not_know_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be sent to worker processes \(.*<lambda>.*workers=1"):
        computed(Local(), lambda: None, tmp_path)
    of_a_notebook = b"c__main__\nno_such_setup\n."
    with pytest.raises(ValueError, match=r"does not know .*no_such_setup.*main__.*workers=1"):
        finish(Local().map_pickled(of_a_notebook, CELLS, 1), CELLS.append)


def test_a_script_that_is_not_guarded_is_not_said_to_lack_memory_and_is_not_tried_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120).stderr
    assert re.search(r"ended before it had computed anything, with exit code 1.*if __name__ ==", said), said
    assert "memory ran out" not in said
    assert len((tmp_path / "begun").read_text()) <= 3, "it was tried again"


def test_a_worker_that_ends_by_itself_is_not_said_to_lack_memory_and_its_cell_is_tried_again(tmp_path):
    with pytest.raises(CellsFailedError, match="3: a worker process ended with exit code 7"):
        computed(Local(retries=1), Toy(tmp_path, "exit"), tmp_path)
    assert len((tmp_path / "tried").read_text().split()) == 2


def test_where_nothing_can_work_it_ends_with_the_first_cells_and_not_after_all_of_them(tmp_path):
    cells = list(range(500))
    with pytest.raises(WorkerDiedError, match="memory ran out"):
        computed(Local(retries=0), Nothing(), tmp_path, cells)


def test_workers_end_with_whoever_does_not_wait_for_them(tmp_path):
    ends = Local().map(Toy(tmp_path), CELLS, 2)
    next(ends)
    ends.close()
    for file in tmp_path.glob("cell-*"):
        process = int(file.read_text().split()[0])
        try:
            os.waitpid(process, 0)
        except ChildProcessError:  # children of the server that started them
            assert _gone(process)


def _gone(process):
    import psutil

    try:
        psutil.Process(process).wait(10)
    except psutil.NoSuchProcess:
        return True
    return not psutil.pid_exists(process)


@pytest.mark.parametrize(
    ("visible", "expected"), [({}, ["0", "1", "2"]), ({"CUDA_VISIBLE_DEVICES": "5, GPU-7"}, ["5", "GPU-7"])]
)
def test_every_gpu_that_this_process_may_use_is_named_as_the_system_names_it(monkeypatch, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3 if not visible else 2)
    assert gpus(visible) == expected
