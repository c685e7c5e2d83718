"""What a person can mend is said in a line on stderr with exit code 1; only a bug of stagewise has a traceback."""

import errno
import re
import shutil
from unittest.mock import Mock

import pytest
import tiny
import torch
from tiny import write_run
from typer.testing import CliRunner

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.directory import write_checkpoint
from stagewise.cli import app
from stagewise.run import pipeline
from stagewise.run.config import load_config
from stagewise.run.executors import CellsFailedError, WorkerDiedError
from stagewise.traces.files import explain_read
from stagewise.traces.lock import RunLockedError

cli = CliRunner()
LESS_MEMORY = r"sampling\.chains"


@pytest.fixture
def config(tmp_path):
    return write_run(tmp_path, retraining=None, estimators=["bif"])


def told(*arguments):
    """The one line that a mistake ends with."""
    result = cli.invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), result.output
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunLockedError("run is in use by process 7 on here; wait"), "^run is in use by process 7"),
        (WorkerDiedError("a worker process was killed"), f"worker process was killed.*{LESS_MEMORY}"),
        (CellsFailedError("2 cells failed and 7 are complete"), "^2 cells failed and 7"),
        (ImportError("executor ray needs Ray: pip install 'stagewise[ray]'"), "pip install"),
        (MemoryError(), f"memory ran out.*{LESS_MEMORY}.*workers|memory ran out.*workers.*{LESS_MEMORY}"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"), f"8 GiB.*forward_batch.*{LESS_MEMORY}"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), LESS_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), LESS_MEMORY),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied: '/x'"),
        (ValueError("chains must be positive"), "^chains must be positive$"),
    ],
)
def test_a_mistake_ends_in_one_line_with_what_to_do(monkeypatch, config, error, message):
    monkeypatch.setattr(pipeline, "run", Mock(side_effect=error))
    line = told("run", config)
    assert not any(part in line for part in ("Traceback", "delete it", "\n"))
    assert re.search(message, line), line


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(monkeypatch, config):
    monkeypatch.setattr(pipeline, "run", Mock(side_effect=KeyboardInterrupt))
    result = cli.invoke(app, ["run", str(config)])
    assert result.exit_code == 130
    assert re.fullmatch(r"interrupted; what is complete is kept, and the same command goes on .*\n", result.stderr)


@pytest.mark.parametrize(
    "error", [KeyError("step"), RuntimeError("size mismatch"), AttributeError("x"), TypeError("y")]
)
def test_a_bug_keeps_its_traceback(monkeypatch, config, error):
    monkeypatch.setattr(pipeline, "run", Mock(side_effect=error))
    assert cli.invoke(app, ["run", str(config)]).exception is error


def test_running_out_of_memory_while_reading_does_not_advise_to_delete_the_cell(tmp_path):
    with pytest.raises(MemoryError), explain_read(tmp_path, "cells/1"):
        raise MemoryError


BROKEN = """
from tiny import *
import tiny
class Broken(list):
    def __getitem__(self, i): return super().__getitem__(i + 1)
def late(model, batch): return tiny.losses(model, batch) @ torch.ones(1)
def bad_data():
    good = tiny.task()
    rows = [good.train.batch(i) for i in range(24)]
    class Rows(torch.utils.data.Dataset):
        def __len__(self): return 24
        def __getitem__(self, i): return Broken(rows)[i]
    return Task(good.model, losses, train=Rows(), queries={"q": Rows()})
def bad_loss():
    good = tiny.task()
    return Task(good.model, late, train=good.train, queries={"q": good.train})
def bad_function(): raise KeyError("split")
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("bad_data", r"mine\.py:5: .*IndexError.*list index out of range"),
        ("bad_loss", r"mine\.py:6: .*RuntimeError: "),
        ("bad_function", r"^task: .*mine\.py:17: KeyError: 'split'$"),
        ("absent", "no function 'absent'"),
    ],
)
def test_an_error_of_the_users_own_code_is_told_with_its_line(config, function, message):
    config.with_name("mine.py").write_text(BROKEN)
    shutil.copy(tiny.__file__, config.with_name("tiny.py"))
    line = told("run", config, "-s", f"task=mine.py:{function}")
    assert re.search(message, line), line


@pytest.mark.parametrize("task", ["pkg/t.py:task", "pkg.t:task"])
def test_a_task_in_a_package_beside_the_configuration_is_found(config, task):
    package = config.parent / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "t.py").write_text("from .base import task as base\ndef task(): return base()\n")
    shutil.copy(tiny.__file__, package / "base.py")
    result = cli.invoke(app, ["run", str(config), "--dry-run", "-s", f"task={task}"])
    assert result.exit_code == 0, result.output


def test_retraining_of_an_optimizer_that_was_not_recorded_is_refused_with_the_way_to_go_on_without_it(config):
    """As the Recorder leaves it out of a run with SGD(nesterov=True)."""
    for path in (config.parent / "checkpoints").iterdir():
        path.unlink()
    for step in (5, 20):
        write_checkpoint(config.parent / "checkpoints", Checkpoint(step, tiny.task().state()))
    line = told("run", config, "-s", "posterior={gamma: 100.0}", "-s", "retraining={window: 4}")
    assert re.search(r"does not say which optimizer.*SGD, Adam or AdamW.*-s retraining=null$", line), line


def test_a_dry_run_of_a_step_that_is_not_there_says_so_as_the_run_does(config):
    assert "steps [7] have no checkpoint" in told("run", config, "--dry-run", "-s", "steps=[7]")
    assert "steps [7] have no checkpoint" in told("run", config, "-s", "steps=[7]")


@pytest.mark.parametrize("command", ["run", "config"])
def test_a_configuration_that_cannot_be_read_is_told(tmp_path, command):
    (tmp_path / "c.yaml").write_text("task: [")
    assert "not valid YAML" in told(command, tmp_path / "c.yaml")


def test_a_moved_run_continues_where_it_is_with_the_cells_it_has(tmp_path):
    config = write_run(tmp_path / "a", task="tiny.py:task", retraining=None, estimators=["bif"], exemplars=0)
    shutil.copy(tiny.__file__, config.with_name("tiny.py"))
    pipeline.run(load_config(config, ["steps=[20]"]))
    (tmp_path / "a").rename(tmp_path / "b")
    seen = []
    results = pipeline.run(
        load_config(tmp_path / "b/run/config.yaml", ["steps=[20, 40]"]), lambda *progress: seen.append(progress)
    )
    assert [told for told in seen if told[0] == "sampling"] == [("sampling", 1, 2), ("sampling", 2, 2)]
    assert results.losses["step"].values.tolist() == [20, 40]
    assert not (tmp_path / "a").exists()
