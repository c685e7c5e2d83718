"""Writers killed with SIGKILL at every kind of moment, and several processes in one run folder.

The writers are real processes. An audit hook reports each change to the file system just before it is made;
the parent lets a writer make a chosen number of them and then kills it, so a kill can fall between any two.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
from synthetic_cells import bits, make_cell

from stagewise.traces.store import Cell, RunLockedError, TraceStore

IDENTITY = {"model": "a" * 64}
CELLS = [Cell(0, 0, "key a"), Cell(0, 1, "key b"), Cell(7, 0, "key c")]
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

# Forked from a server that has imported the store already: imports for every writer would take minutes.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "stagewise.traces.store"])


def tree_of(cell):
    return make_cell(cell.step, cell.block)


def report_changes(root, report):
    one_at_a_time = threading.Lock()  # zarr has threads of its own

    def hook(event, args):
        changes = event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(args[0]).startswith(str(root)):
            with one_at_a_time:
                report()

    sys.addaudithook(hook)


def run(root, pipe, wait):
    """What a run does: lock, sweep, write the cells that are missing."""

    def report():
        pipe.send("change")
        if wait:
            pipe.recv()
        else:
            time.sleep(0.015)  # else all is written before anybody has heard of it

    report_changes(root, report)
    store = TraceStore.open(root, IDENTITY)
    with store.lock():
        store.sweep()
        for cell in CELLS:
            if not store.is_complete(cell):
                store.write(cell, tree_of(cell))
    pipe.send("finished")


def hold_lock(root, pipe):
    with TraceStore.open(root, IDENTITY).lock():
        pipe.send(os.getpid())
        pipe.recv()
    pipe.send("released")
    pipe.recv()


def write_all(root, pipe):
    pipe.recv()
    store = TraceStore.open(root, IDENTITY, create=False)
    for cell in CELLS:
        store.write(cell, tree_of(cell))
    pipe.send("finished")


class Child:
    """A process with a pipe, killed on leaving."""

    def __init__(self, target, *args):
        self.pipe, theirs = context.Pipe()
        root, *rest = args
        self.process = context.Process(target=target, args=(root, theirs, *rest), daemon=True)
        self.process.start()
        theirs.close()  # so that a child that fails ends the conversation

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        assert self.process.exitcode in (-signal.SIGKILL, 0)


def run_and_kill(root, after, wait=True):
    """Kill a run after it has reported ``after`` changes, or a bit later; the number reported if it finished before."""
    with Child(run, root, wait) as child:
        for count in range(after):
            if child.pipe.recv() == "finished":
                return count
            if wait and count < after - 1:
                child.pipe.send("go on")
        if not wait:
            time.sleep(0.003 * (after % 10))
    return None


def check(root):
    """Every cell is absent or whole; returns how many are whole."""
    if not (root / "identity.json").exists():
        return 0
    store = TraceStore.open(root, IDENTITY, create=False)
    complete = [cell for cell in CELLS if store.is_complete(cell)]
    assert store.steps == tuple(sorted({cell.step for cell in complete}))
    for step in store.steps:
        blocks = [cell.block for cell in complete if cell.step == step]
        expected = np.concatenate([tree_of(Cell(step, b, "k"))["train"]["loss"].values for b in blocks])
        loaded = store.load(step)
        assert loaded["train"]["loss"].values.tobytes() == expected.tobytes()
        if blocks == [0]:
            assert bits(loaded) == bits(tree_of(Cell(step, 0, "k")))
    return len(complete)


def leftovers(root):
    return [path for path in root.rglob("*") if path.name.startswith((".partial", ".swept"))]


def content(root):
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Files of a run that nobody killed, and how many changes it made."""
    root = tmp_path_factory.mktemp("uninterrupted") / "run"
    changes = run_and_kill(root, after=10**6)
    assert check(root) == len(CELLS)
    return content(root), changes


@pytest.mark.parametrize("wait", [True, False], ids=["between changes", "anywhere"])
def test_a_run_killed_again_and_again_ends_bit_identical_to_one_that_was_not(tmp_path, uninterrupted, wait):
    files, changes = uninterrupted
    root = tmp_path / "run"
    rng = np.random.default_rng(0)
    kills, torn, done = 0, 0, 0
    while run_and_kill(root, int(rng.integers(1, changes // 2)), wait) is None:
        kills += 1
        now = check(root)
        assert now >= done, "a complete cell was lost"
        done = now
        torn += bool(leftovers(root))
        assert kills < 200
    assert kills >= 4
    assert torn >= 1 + wait, "no kill fell into the writing of a cell: the test tests nothing"
    assert check(root) == len(CELLS)
    assert leftovers(root) == []
    assert content(root) == files


def test_a_kill_before_any_change_of_a_cell_leaves_it_absent_and_after_the_last_complete(tmp_path, uninterrupted):
    _, changes = uninterrupted
    complete = []
    for after in range(1, changes):
        root = tmp_path / str(after)
        assert run_and_kill(root, after) is None
        complete.append(check(root))
    assert complete == sorted(complete)
    assert complete[0] == 0
    assert complete[-1] == len(CELLS)


def test_a_second_run_is_refused_with_the_name_of_the_first_until_that_is_killed(tmp_path):
    store = TraceStore.open(tmp_path / "run", IDENTITY)
    with Child(hold_lock, store.root) as child:
        pid = child.pipe.recv()
        with pytest.raises(RunLockedError, match=rf"process {pid} on {socket.gethostname()}.*out="):
            store.lock().__enter__()
        store.write(CELLS[0], tree_of(CELLS[0]))  # its workers do not need the lock
    with store.lock():
        pass


def test_a_lock_that_was_given_back_is_free_while_its_process_lives(tmp_path):
    store = TraceStore.open(tmp_path / "run", IDENTITY)
    with Child(hold_lock, store.root) as child:
        child.pipe.recv()
        child.pipe.send("give it back")
        assert child.pipe.recv() == "released"
        with store.lock():
            pass


def test_a_lock_is_refused_within_one_process_too(tmp_path):
    store = TraceStore.open(tmp_path / "run", IDENTITY)
    with store.lock(), pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
        store.lock().__enter__()


def test_two_processes_that_write_the_same_cells_at_once_end_with_one_of_each(tmp_path, uninterrupted):
    root = TraceStore.open(tmp_path / "run", IDENTITY).root
    with Child(write_all, root) as first, Child(write_all, root) as second:
        for child in (first, second):
            child.pipe.send("go")
        assert [child.pipe.recv() for child in (first, second)] == ["finished", "finished"]
    assert check(root) == len(CELLS)
    assert content(root) == uninterrupted[0]
