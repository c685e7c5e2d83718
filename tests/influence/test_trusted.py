from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from synthetic_traces import losses, tree

import stagewise
from stagewise.influence.bif import NoTrustedCheckpointError, bif
from stagewise.influence.llc import llc
from stagewise.influence.trusted import ReadOnce, TracesInMemory
from stagewise.traces.diagnostics import diagnose_run
from stagewise.traces.store import Cell, TraceStore


@pytest.mark.parametrize("labels", [None, {"train": list("abba"), "queries": {"val": list("xyx")}}])
def test_influence_from_trees_in_memory_is_that_from_a_store_of_the_same_trees(tmp_path, labels):
    trees = {step: tree(losses(4, seed=step), {"val": losses(3, seed=9)}) for step in (20, 3)}
    store = TraceStore.open(tmp_path / "run", {"model": "a"})
    for step, whole in trees.items():
        store.write(Cell(step, 0, "key"), whole)
    if labels:
        store.write_labels(labels["train"], labels["queries"])
    memory = TracesInMemory(trees, labels)
    assert list(memory.steps) == list(store.steps) == [3, 20]
    xr.testing.assert_allclose(bif(memory), bif(store), rtol=1e-5)
    assert bif(memory).attrs == bif(store).attrs


def test_the_error_of_no_trusted_checkpoint_is_found_where_it_is_raised_from():
    with pytest.raises(NoTrustedCheckpointError, match="The store is empty"):
        bif(TracesInMemory({}))
    assert stagewise.TracesInMemory is TracesInMemory


def test_a_run_folder_is_read_by_its_path(tmp_path):
    store = TraceStore.open(tmp_path / "run", {"model": "a"})
    store.write(Cell(3, 0, "key"), tree(losses(4), {"val": losses(3)}))
    for estimate in (bif, llc):
        xr.testing.assert_identical(estimate(str(tmp_path / "run")), estimate(store))


@pytest.mark.parametrize(("room", "reads"), [(2**28, [3, 20]), (0, [3, 20] * 3)])
def test_a_store_that_is_read_once_gives_the_same_and_reads_again_only_what_has_no_room(
    tmp_path, monkeypatch, room, reads
):
    store = TraceStore.open(tmp_path / "run", {"model": "a"})
    store.write(Cell(3, 0, "key"), tree(losses(4), {"val": losses(3)}))
    drifting = losses(4, seed=1) + np.linspace(0, 50, losses(4).shape[1])[:, None]
    store.write(Cell(20, 0, "key"), tree(drifting, {"val": losses(3, seed=2)}))
    expected, verdicts = bif(store), diagnose_run(store)
    assert expected["step"].values.tolist() == [3]  # the other is omitted, with its reason
    seen, load = [], TraceStore.load
    monkeypatch.setattr(TraceStore, "load", lambda self, step: (seen.append(step), load(self, step))[1])
    traces = replace(ReadOnce.of(store), room=room)
    xr.testing.assert_identical(traces.diagnostics, verdicts)
    xr.testing.assert_identical(bif(traces), expected)
    xr.testing.assert_identical(bif(traces), expected)
    assert seen == reads
