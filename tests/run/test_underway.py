"""Chains of a killed process: they go on where they were, and nothing of it can be seen in what they saw."""

from itertools import count
from pathlib import Path

import pytest
import torch
from built_anew import make_task

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.run.engine import sample
from stagewise.sampling import block
from stagewise.sampling.chains import Chains
from stagewise.sampling.posterior import LocalPosterior
from stagewise.traces import underway
from stagewise.traces.store import Cell, RunFolderError, TraceStore

POSTERIOR = LocalPosterior(window=5, n_beta=200.0)
SHORT = {"chains": 3, "draws": 6, "burn_in": 6, "thinning": 2, "batching": "loop"}
STEPS = 6 + 6 * 2


def checkpoint():
    return Checkpoint(5, make_task().state(), Optimizer("sgd", 0.05, batch_size=0))


RUN = Trajectory.from_checkpoints([checkpoint()])


def sampled(out, after=None, **settings):
    """Traces of a run that is killed after so many steps; and how many steps of its cell it began with."""
    seen = []

    def progress(what, done, total):
        if what == "steps of this cell":
            seen.append(done)
            if after is not None and done > after:
                raise KeyboardInterrupt

    store = sample(make_task(), RUN, POSTERIOR, out=out, sampling=Chains(**SHORT | settings), progress=progress)
    return store.load(5), seen[0] - 1


@pytest.fixture(autouse=True)
def _kept_after_every_step(monkeypatch):
    monkeypatch.setattr(underway, "SECONDS", 0.0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "sgld", "batch_size": 5, "step_size": 1e-4},
        {"sampler": "sgld", "batch_size": 5, "step_size": 1e-4, "control_variate": False, "batching": "stacked"},
        {"sampler": "rmsprop_sgld", "batch_size": 5, "step_size": 1e-5, "single_tokens": True, "reflect": False},
        {"sampler": "sgld", "batch_size": 5, "step_size": 1e-4, "linear": True},
    ],
    ids=["underdamped", "sgld", "own batches", "rmsprop", "coupled"],
)
@pytest.mark.parametrize("after", [1, 4, 9, STEPS - 1])
def test_a_cell_goes_on_in_the_midst_with_the_bits_of_an_undisturbed_one(tmp_path, settings, after):
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path / "killed", after, **settings)
    (whole, _), (continued, begun) = sampled(tmp_path / "whole", **settings), sampled(tmp_path / "killed", **settings)
    assert continued.identical(whole)
    assert begun == after
    assert len(list((tmp_path / "killed" / "cells").iterdir())) == 1


def test_independent_draws_and_chains_that_move_one_by_one_go_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(block, "_MOST_NUMBERS", 1)
    window = {"sampler": "window", "step_size": None, "burn_in": None, "thinning": None}
    coupled = {"batch_size": 5, "step_size": 1e-4, "linear": True}
    adaptive = {"sampler": "rmsprop_sgld", "batch_size": 5, "step_size": 1e-5}
    for number, settings in enumerate([window, adaptive, coupled]):
        for after in (2, 4):  # killed twice
            with pytest.raises(KeyboardInterrupt):
                sampled(tmp_path / f"killed {number}", after, **settings)
        (whole, _), (continued, begun) = (
            sampled(tmp_path / f"{how} {number}", **settings) for how in ("whole", "killed")
        )
        assert continued.identical(whole)
        assert begun == 4


@pytest.mark.parametrize("damage", ["cut", "another cell's"])
def test_chains_that_cannot_be_read_or_are_of_another_cell_begin_again(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path / "killed", 9)
    (kept,) = (tmp_path / "killed" / "cells").glob("*.underway")
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-500])
    else:
        other = underway.UnderwayFile(kept, "another key")
        assert other.load() is None
        other.keep(lambda: {"done": 17})
    (whole, _), (continued, begun) = sampled(tmp_path / "whole"), sampled(tmp_path / "killed")
    assert continued.identical(whole)
    assert begun == 0


def test_a_pickle_planted_for_chains_under_way_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "trapped",)

    kept = tmp_path / "kept"
    torch.save({"key": "key", "state": Trap()}, kept)
    assert underway.UnderwayFile(kept, "key").load() is None
    assert not (tmp_path / "trapped").exists()


def test_chains_are_kept_only_now_and_then_and_a_full_disk_is_named(tmp_path, monkeypatch):
    clock = count()
    monkeypatch.setattr(underway.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(underway, "SECONDS", 3.0)
    file = TraceStore.open(tmp_path / "run", {"model": "a"}).underway(Cell(0, 0, "key"))
    written = []
    for step in range(10):
        file.keep(lambda step=step: written.append(step) or {"step": step})
    assert 0 < len(written) < 5
    assert file.load() == {"step": written[-1]}

    monkeypatch.setattr(underway, "SECONDS", 0.0)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda _, mode: real(Path("/dev/full"), mode))
    with pytest.raises(RunFolderError, match="No space left.*free some space and run again"):
        file.keep(lambda: {"chains": torch.zeros(10**5)})
    monkeypatch.undo()
    assert file.load() == {"step": written[-1]}


def test_what_was_under_way_goes_once_its_cell_is_whole(tmp_path):
    sampled(tmp_path)
    store = TraceStore.read_only(tmp_path)
    left = tmp_path / "cells" / "00000005-0000.zip.underway"
    left.write_bytes(b"of a writer killed between two moments")
    sampled_again = TraceStore.open(tmp_path, store.identity)
    with sampled_again.lock():
        sampled_again.sweep()
    assert not left.exists()
