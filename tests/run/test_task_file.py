"""A stranger's file is imported for what it is, beside whatever else has its name."""

import pickle
import random
import sys
import types
from concurrent.futures.process import _ExceptionWithTraceback
from functools import partial

import pytest
import torch

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.run.config import ConfigError
from stagewise.run.engine import sample
from stagewise.run.executors.base import Worker
from stagewise.run.task_file import load_task, place_in_task_file
from stagewise.sampling.posterior import LocalPosterior
from stagewise.traces.store import Cell

BODY = """
import torch, stagewise as sw
from torch import nn
from torch.nn import functional
class Net(nn.Linear): pass
def losses(model, batch): return functional.mse_loss(model(batch[0]), batch[1], reduction="none").sum(-1)
def task(n=N):
    x = torch.ones(n, 2)
    return sw.Task(Net(2, 1).eval(), losses, train=(x, x[:, :1]), queries={"q": (x, x[:, :1])})
"""


def put(folder, name, text="", n=3):
    """A task file with the given text in front."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + BODY.replace("N)", f"{n})"))
    return f"{path}:task"


@pytest.fixture(autouse=True)
def restored():
    """Imports leave nothing behind for other tests."""
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]


@pytest.mark.parametrize("name", ["torch.py", "random.py", "types.py", "task.py", "stagewise.py", "my-task.py"])
def test_a_task_file_may_have_any_name_and_takes_no_other_modules_place(tmp_path, name):
    before = torch, random, types, sys.modules["stagewise"]
    assert len(load_task(put(tmp_path, name), {}).train) == 3
    assert (sys.modules["torch"], sys.modules["random"], sys.modules["types"], sys.modules["stagewise"]) == before
    assert "task" not in sys.modules


def test_two_files_of_one_name_with_neighbours_of_one_name_stay_apart(tmp_path):
    for folder, n in (("a", 3), ("b", 5)):
        reference = put(tmp_path / folder, "task.py", "from neighbour import n as N\n", n="N")
        (tmp_path / folder / "neighbour.py").write_text(f"n = {n}\n")
        first = load_task(reference, {})
        assert len(first.train) == n
    again = load_task(f"{tmp_path}/a/task.py:task", {})
    assert len(again.train) == 3
    assert type(again.model).__module__ != type(first.model).__module__


def test_neighbours_do_not_take_the_place_of_what_is_installed(tmp_path):
    (tmp_path / "statistics.py").write_text("mean = None\n")
    (tmp_path / "helpful.py").write_text("n = 4\n")
    task = load_task(
        put(tmp_path, "t.py", "import statistics\nfrom helpful import n as N\nstatistics.mean([1])\n", "N"), {}
    )
    assert len(task.train) == 4


def test_a_neighbour_may_be_imported_late(tmp_path):
    (tmp_path / "helpful.py").write_text("n = 4\n")
    body = "def late():\n    from helpful import n\n    return task(n)\n"
    reference = put(tmp_path, "t.py")
    (tmp_path / "t.py").write_text((tmp_path / "t.py").read_text() + body)
    assert len(load_task(reference.replace(":task", ":late"), {}).train) == 4


@pytest.mark.parametrize(
    "text",
    ["from .util import n as N\n", "from pkg.util import n as N\n", "from . import util\nN = util.n\n"],
)
def test_a_file_inside_a_package_imports_from_it_relatively_and_by_name(tmp_path, text):
    reference = put(tmp_path / "pkg", "t.py", text, "N")
    (tmp_path / "pkg/__init__.py").touch()
    (tmp_path / "pkg/util.py").write_text("n = 6\n")
    assert len(load_task(reference, {}).train) == 6
    assert len(load_task(f"{tmp_path}/pkg.t:task", {}).train) == 6


def test_a_file_deep_inside_a_package_reaches_the_top(tmp_path):
    reference = put(tmp_path / "pkg/sub", "t.py", "from ..util import n as N\n", "N")
    for folder in ("pkg", "pkg/sub"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "pkg/util.py").write_text("n = 6\n")
    assert len(load_task(reference, {}).train) == 6


def test_a_folder_without_init_is_a_package_too_when_it_is_named_as_one(tmp_path):
    put(tmp_path / "pkg", "t.py", "from pkg.util import n as N\n", "N")
    (tmp_path / "pkg/util.py").write_text("n = 6\n")
    assert len(load_task(f"{tmp_path}/pkg.t:task", {}).train) == 6


def test_a_changed_file_is_read_again(tmp_path):
    reference = put(tmp_path, "t.py", n=3)
    assert len(load_task(reference, {}).train) == 3
    put(tmp_path, "t.py", n=11)
    assert len(load_task(reference, {}).train) == 11


def test_models_and_losses_of_a_task_file_can_be_pickled(tmp_path):
    task = load_task(put(tmp_path, "t.py"), {})
    model, loss = pickle.loads(pickle.dumps((task.model, task.loss)))
    assert type(model) is type(task.model)
    assert loss is task.loss


def test_workers_sample_a_task_beside_files_that_are_called_like_what_they_need_themselves(tmp_path):
    reference = put(tmp_path, "torch.py")
    for name in ("random.py", "logging.py", "numpy.py"):
        (tmp_path / name).write_text("raise RuntimeError('imported instead of the real one')\n")
    make_task = partial(load_task, reference, {})
    task = make_task()
    store = sample(
        task,
        Trajectory.from_checkpoints([Checkpoint(step, task.state()) for step in (1, 2)]),
        posterior=LocalPosterior(gamma=1e3),
        out=tmp_path / "run",
        workers=2,
        make_task=make_task,
        chains=2,
        draws=4,
        batching="loop",
    )
    assert store.steps == (1, 2)


def test_a_task_that_fails_in_a_worker_is_told_as_what_keeps_it_from_starting_and_not_a_dead_worker(tmp_path):
    make_task = partial(load_task, put(tmp_path, "t.py", "raise OSError('no data here')\n"), {})
    told = Worker(pickle.dumps(make_task))(Cell(1, 0, "key"))
    assert not told.started
    with pytest.raises(ConfigError, match=r"t\.py:1: OSError: no data here"):
        raise told.error


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_thing\n", r"t\.py:1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("x = 1 +\n", r"t\.py:1: SyntaxError"),
        ("def f(): raise KeyError('split')\n\nf()\n", r"t\.py:1: KeyError: 'split'"),
        ("import torch\ntorch.ones(2) @ torch.ones(3)\n", r"t\.py:2: RuntimeError: "),
        ("import sys\nsys.exit(2)\n", r"t\.py:2: SystemExit: 2"),
        ("raise ValueError('first\\nsecond')\n", r"t\.py:1: ValueError: first$"),
        ("import helpful\n", r"helpful\.py:2: ZeroDivisionError"),
    ],
)
def test_an_error_of_the_file_is_told_in_one_line_with_its_place(tmp_path, text, message):
    (tmp_path / "helpful.py").write_text("\n1 / 0\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_task(put(tmp_path, "t.py", text), {})
    assert "\n" not in str(caught.value)


def test_an_error_of_the_function_is_told_with_the_users_line_and_not_stagewises(tmp_path):
    reference = put(tmp_path, "t.py")
    path = tmp_path / "t.py"
    path.write_text(path.read_text().replace('queries={"q"', 'queries={"q/q"'))
    with pytest.raises(ConfigError, match=r"t\.py:9: ValueError: .*q/q"):
        load_task(reference, {})


def test_wrong_arguments_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"t\.py:task: TypeError: .*'m'"):
        load_task(put(tmp_path, "t.py"), {"m": 3})


def test_running_out_of_memory_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(MemoryError):
        load_task(put(tmp_path, "t.py", "raise MemoryError\n"), {})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("t.py", "'file.py:function' or 'module:function'"),
        ("absent.py:task", "no file .*absent.py"),
        ("absent.module:task", "no module 'absent'.*nor beside"),
        ("json.absent:task", r"no module 'json\.absent'"),
        ("json:dump5", "no function 'dump5'; did you mean 'dump'"),
        ("os:getcwd", "returned str, expected a stagewise.Task"),
    ],
)
def test_what_cannot_be_found_is_named(reference, message):
    with pytest.raises(ConfigError, match=message):
        load_task(reference, {})


def test_a_name_with_a_dot_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="dot; rename it"):
        load_task(put(tmp_path, "my.task.py"), {})


def raised(function, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*arguments)
    return caught.value


def test_errors_of_the_users_code_are_told_from_those_of_stagewise(tmp_path):
    wrong = "def wrong(): sw.Task(Net(2, 1), losses, train=(), queries={})\n"
    task = load_task(put(tmp_path, "t.py", wrong), {})
    batch = (torch.ones(2, 5), torch.ones(2, 1))
    own = raised(task.losses, {}, batch)
    assert place_in_task_file(own) == f"{tmp_path}/t.py:7"
    from_a_worker = pickle.loads(pickle.dumps(_ExceptionWithTraceback(own, own.__traceback__)))
    assert place_in_task_file(from_a_worker) == f"{tmp_path}/t.py:7"
    assert place_in_task_file(raised(sys.modules[task.loss.__module__].wrong)) is None
