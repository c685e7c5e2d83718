import errno
import json
import math
import os
import warnings
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import Pickle
from synthetic_cells import bits, make_cell, make_empty_cell
from zarr.storage import ZipStore

from stagewise.traces import files as files_module
from stagewise.traces import store as store_module
from stagewise.traces.files import SweptError
from stagewise.traces.store import Cell, RunFolderError, RunMismatchError, TraceStore

CELL = "cells/00000010-0000.zip"
IDENTITY = {"model": "a" * 64, "loss": "b" * 64, "training data": "c" * 64, "query 'val'": "d" * 64}


@pytest.fixture
def store(tmp_path):
    return TraceStore.open(tmp_path / "run", IDENTITY)


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def entries(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def changed(file, change):
    """Write the file again with what becomes of every entry; None leaves one out."""
    new = {name: change(name, content) for name, content in entries(file).items()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in new.items():
            if content is not None:
                archive.writestr(name, content)


# What goes in comes out.


@pytest.mark.parametrize(
    "tree",
    [
        make_cell(),
        make_cell(tokens=(4,), reflected=True),
        make_cell(statuses=("ok", "diverged")),
        make_cell(offset=1e7),
        make_empty_cell(largest_window=7.5),
        make_empty_cell(status="unusable", unusable="no record of its optimiser"),
        make_cell(curvature_min=-math.inf, kappa=float("nan"), seeds=(1, 2), hot={"a": [1.5, None, math.inf]}),
        make_cell(n_beta=np.float64(3.5), draws=np.int64(7), localised=np.bool_(True), sizes=np.array([1, 2])),
    ],
)
def test_a_cell_comes_back_bit_for_bit_without_a_warning(store, tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.write(Cell(10, 0, "k"), tree)
        loaded = store.load(10)
        attrs = store.attrs(10)
    arrays, facts = bits(loaded)
    expected = {k: v for k, v in bits(tree)[0].items() if not k.endswith("status")}
    assert {k: v for k, v in arrays.items() if not k.endswith("status")} == expected
    assert loaded["chains"]["status"].values.tolist() == tree["chains"]["status"].values.tolist()
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in tree.attrs.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
    assert repr(facts["/"]) == repr(attrs) == repr(plain)
    assert facts["/chains"] == {}
    assert all(facts[path] == tree[path].attrs for path in facts if path != "/")


def test_losses_of_a_diverged_chain_are_kept_even_if_not_finite(store):
    tree = make_cell(statuses=("diverged", "ok"))
    tree["train"]["loss"].values[0, 3:] = np.nan
    tree["train"]["loss"].values[0, 2] = -np.inf
    store.write(Cell(10, 0, "k"), tree)
    assert bits(store.load(10))[0]["/train/loss"] == bits(tree)[0]["/train/loss"]


def test_losses_that_are_large_beside_their_fluctuations_keep_them_in_half_the_bytes(store):
    store.write(Cell(10, 0, "k"), make_cell(offset=1e7))
    loaded, plain = store.load(10)["train"], make_cell()["train"]
    fluctuations = loaded["loss"] - loaded["loss_anchor"]
    np.testing.assert_allclose(fluctuations, plain["loss"] - plain["loss_anchor"], atol=1e-8)
    on_disk = zarr.open_group(ZipStore(store.root / CELL, mode="r"), mode="r")["train/loss"]
    assert on_disk.dtype == np.float32
    assert abs(on_disk[...]).max() < 10  # changes, and so it says
    assert on_disk.attrs["relative_to"] == "loss_anchor"


def test_chains_of_several_blocks_are_relative_to_one_anchor(store):
    # Another device may round large anchors otherwise; the chains of its block must not stand apart for that.
    other = make_cell(block=1, offset=1e7)
    for name in ("loss", "loss_anchor"):
        other["train"][name].values[...] += 1.0
    store.write(Cell(10, 0, "a"), make_cell(offset=1e7))
    store.write(Cell(10, 1, "b"), other)
    expected = make_cell(block=1, offset=1e7)["train/loss"]
    np.testing.assert_allclose(store.load(10)["train/loss"].sel(chain=[2, 3]), expected, atol=1e-6)


def test_the_evidence_of_a_cell_is_its_probe_and_the_losses_at_the_checkpoint_without_its_draws(store):
    numbers = {"training data": [0.1 + 0.2, -1e300], "gradient": [5e-324, math.nan]}
    store.write(Cell(10, 0, "k"), make_cell(), numbers)
    changed(store.root / CELL, lambda name, content: None if name.startswith("train/loss/c") else content)
    probe, anchors = store.evidence(10, 0)
    assert repr(probe) == repr(numbers)
    assert set(anchors) == {"train", "queries/val"}
    np.testing.assert_array_equal(anchors["train"], make_cell()["train/loss_anchor"])
    assert "probe" not in store.attrs(10)
    with pytest.raises(RunFolderError, match="00000011-0000.zip cannot be read"):
        store.evidence(11, 0)


def test_attributes_on_disk_are_json_for_any_reader(store):
    store.write(Cell(10, 0, "k"), make_cell(curvature_min=-math.inf, kappa=float("nan")))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    texts = [content for name, content in entries(store.root / CELL).items() if name.endswith(".json")]
    assert len(texts) > 5
    for text in [*texts, (store.root / "identity.json").read_text()]:
        json.loads(text, parse_constant=refuse)


def test_xarray_reads_a_cell_by_itself_and_sees_the_status_as_flags(store):
    store.write(Cell(10, 0, "k"), make_cell(statuses=("ok", "diverged")))
    tree = xr.open_datatree(ZipStore(store.root / CELL, mode="r"), engine="zarr", consolidated=False, chunks=None)
    np.testing.assert_array_equal(tree["train/loss"] + tree["train/loss_anchor"], make_cell()["train/loss"])
    status = tree["chains/status"]
    assert status.dtype == np.int8
    meanings = status.attrs["flag_meanings"].split()
    assert [meanings[code] for code in status.values] == ["ok", "diverged"]
    assert tree.attrs["stagewise"].items() >= {"step": 10, "block": 0, "key": "k"}.items()


def test_an_array_larger_than_the_codec_takes_is_split_into_chunks(store, monkeypatch):
    monkeypatch.setattr("stagewise.traces.zarr_tree._CHUNK_BYTES", 64)
    store.write(Cell(10, 0, "k"), make_cell(tokens=(4,)))
    assert sum(name.startswith("train/loss/c") for name in entries(store.root / CELL)) > 10
    assert bits(store.load(10)) == bits(make_cell(tokens=(4,)))


# Blocks of one step become one tree.


def test_blocks_are_joined_along_chain_in_block_order(store):
    for block in (2, 0, 1):
        statuses = ("ok", "diverged") if block == 1 else ("ok", "ok")
        store.write(Cell(10, block, f"k{block}"), make_cell(block=block, statuses=statuses, seconds=block))
    tree = store.load(10)
    assert tree["chains"]["chain"].values.tolist() == [0, 1, 2, 3, 4, 5]
    assert tree["chains"]["status"].values.tolist() == ["ok", "ok", "ok", "diverged", "ok", "ok"]
    for block in range(3):
        for path in ("train", "queries/val"):
            part = tree[path].to_dataset().sel(chain=[2 * block, 2 * block + 1])
            xr.testing.assert_identical(part, make_cell(block=block)[path].to_dataset())
    assert tree["train"]["loss_anchor"].dims == ("sample",)
    assert "seconds" not in tree.attrs  # the blocks differ in it
    assert tree.attrs == store.attrs(10) == make_cell().attrs


def test_steps_are_those_with_a_complete_cell_in_ascending_order(store):
    assert store.steps == ()
    for step in (1000, 0, 123456789):
        store.write(Cell(step, 0, "k"), make_cell(step))
    (store.root / "cells" / "notes").mkdir()
    (store.root / "cells" / ".partial-00000007-0000.zip-1-x").touch()
    assert store.steps == (0, 1000, 123456789)
    assert bits(store.load(123456789)) == bits(make_cell(123456789))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (make_cell(block=0), "share chain numbers"),
        (make_cell(block=1, n_beta=7.0), "disagree on n_beta: 100.0 and 7.0"),
        (make_cell(step=11, block=1), "disagree on 'loss_anchor'"),
        (make_cell(block=1, reflected=True), "differ in size"),
        (make_cell(block=1, tokens=(2,)), "differ in size"),
        (make_empty_cell(block=1), "disagree on n_beta"),
        (make_empty_cell(block=1, n_beta=100.0, window=30, localised=True), None),
    ],
)
def test_blocks_that_do_not_fit_are_refused(store, second, message):
    store.write(Cell(10, 0, "k"), make_cell())
    if message is None:
        with pytest.raises(ValueError, match="localised=False"):
            store.write(Cell(10, 1, "k"), second)
        return
    store.write(Cell(10, 1, "k"), second)
    # Nothing is damaged: the advice is not to compute all again.
    with pytest.raises(RunFolderError, match=rf"blocks of step 10 are not of one run.*{message}.*out="):
        store.load(10)


def test_blocks_with_different_query_sets_are_refused(store):
    other = make_cell(block=1)
    other["queries/test"] = other["queries/val"]
    store.write(Cell(10, 0, "k"), make_cell())
    store.write(Cell(10, 1, "k"), other)
    with pytest.raises(RunFolderError, match=r"different groups.*queries/test"):
        store.load(10)


def test_anchors_that_differ_by_rounding_only_are_the_same_checkpoint(store):
    other = make_cell(block=1)
    other["train"]["loss_anchor"].values *= 1 + 1e-6
    store.write(Cell(10, 0, "k"), make_cell())
    store.write(Cell(10, 1, "k"), other)
    assert store.load(10)["train"].sizes["chain"] == 4


def test_a_step_that_is_not_there_names_those_that_are(store):
    store.write(Cell(10, 0, "k"), make_cell())
    for read in (store.load, store.attrs):
        with pytest.raises(KeyError, match=r"no traces of step 11; it holds \[10\]"):
            read(11)


# What is not a cell is refused before anything is written.


def _broken(change):
    tree = make_cell()
    change(tree)
    return tree


def _set(path, name, value):
    def change(tree):
        tree[path] = xr.DataTree(tree[path].to_dataset().assign({name: value}))

    return change


def _drop(path, name):
    return lambda tree: tree.__setitem__(path, xr.DataTree(tree[path].to_dataset().drop_vars(name)))


def _label_samples(tree):
    tree["train"] = xr.DataTree(tree["train"].to_dataset().assign_coords(group=("sample", np.arange(5))))


LOSS = make_cell()["train"]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.children["chains"].orphan(), "needs the group 'chains'"),
        (_drop("chains", "status"), "variable 'status"),
        (_drop("chains", "chain"), "coordinate 'chain'"),
        (_drop("train", "chain"), "'train' needs the same coordinate 'chain'"),
        (_drop("train", "loss_anchor"), "'train/loss_anchor' must be float64 .*got nothing"),
        (_drop("train", "share"), "'train/share' must be float64 .*got nothing"),
        (_set("train", "loss", LOSS.astype(np.float32)), "'train/loss' must be float64 .*got float32"),
        (_set("train", "loss", LOSS.transpose("draw", "chain", "sample")), "dimensions .chain, draw, sample"),
        (_set("train", "loss_reflected", LOSS[0]), "'train/loss_reflected' must be float64"),
        (_set("train", "loss", LOSS.where(LOSS[1, 2, 3] != LOSS)), "not finite although .* ok"),
        (_set("train", "note", ("draw", np.array(["a b"] * 6))), "numbers or single words.*got 'a b'"),
        (_set("train", "note", ("draw", np.array([{}] * 6, object))), "numbers or single words"),
        (lambda t: t.attrs.update(model=object()), "attribute 'model' must be JSON"),
        (_label_samples, "only dimensions may have coordinates"),
    ],
)
def test_what_is_not_a_cell_is_refused_and_leaves_no_trace(store, change, message):
    before = files(store.root)
    with pytest.raises(ValueError, match=message):
        store.write(Cell(10, 0, "k"), _broken(change))
    assert files(store.root) == before
    assert store.steps == ()


@pytest.mark.parametrize("wrong", [{"step": -1}, {"block": -1}, {"key": ""}])
def test_a_cell_that_could_not_be_found_again_is_refused(wrong):
    with pytest.raises(ValueError, match="step >= 0"):
        Cell(**({"step": 1, "block": 0, "key": "k"} | wrong))


# Of which run a folder is.


def test_the_same_identity_opens_the_same_cells_again(store):
    store.write(Cell(10, 0, "k"), make_cell())
    again = TraceStore.open(store.root, dict(reversed(IDENTITY.items())), create=False)
    assert again.is_complete(Cell(10, 0, "k"))
    assert not again.is_complete(Cell(10, 1, "k"))
    assert not again.is_complete(Cell(11, 0, "k"))


def test_a_mismatch_names_every_part_that_differs_is_missing_or_new(store):
    other = {"model": "e" * 64, "loss": "b" * 64, "query 'val'": "f" * 64, "sampler": "0" * 64}
    with pytest.raises(RunMismatchError) as error:
        TraceStore.open(store.root, other)
    lines = str(error.value).splitlines()
    assert str(store.root) in lines[0]
    assert lines[1:-1] == [
        "  model: differs (folder aaaaaaaaaaaa, now eeeeeeeeeeee)",
        "  query 'val': differs (folder dddddddddddd, now ffffffffffff)",
        "  sampler: new, the folder's run has none",
        "  training data: missing, the folder's run has it",
    ]
    assert "out=" in lines[-1]
    assert TraceStore.read_only(store.root).identity == IDENTITY  # nothing was overwritten


def test_a_cell_under_another_key_is_named_by_its_step_and_kept(store):
    store.write(Cell(46, 3, "old"), make_cell())
    before = files(store.root)
    for act in (lambda c: store.is_complete(c), lambda c: store.write(c, make_cell(11))):
        with pytest.raises(RunMismatchError, match=r"step 46, block 3.*weights of the checkpoint.*out="):
            act(Cell(46, 3, "new"))
    assert files(store.root) == before


def test_writing_a_cell_again_changes_nothing(store):
    store.write(Cell(10, 0, "k"), make_cell())
    before = files(store.root)
    store.write(Cell(10, 0, "k"), make_cell(99))
    assert files(store.root) == before


# Folders that are no run folders.


def test_reading_what_is_no_run_folder_says_so(tmp_path):
    with pytest.raises(RunFolderError, match="no run folder"):
        TraceStore.read_only(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="no run folder"):
        TraceStore.open(tmp_path, IDENTITY, create=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read as the identity"):
        TraceStore.read_only(tmp_path)
    (tmp_path / "identity.json").write_text("[]")
    with pytest.raises(RunFolderError, match="cannot be read as the identity"):
        TraceStore.read_only(tmp_path)


@pytest.mark.parametrize("number", [1, 9])
def test_a_folder_of_another_version_is_refused_by_name_with_the_remedy(tmp_path, number):
    content = {"format": f"stagewise traces {number}", "identity": IDENTITY}
    (tmp_path / "identity.json").write_text(json.dumps(content))
    for act in (lambda: TraceStore.read_only(tmp_path), lambda: TraceStore.open(tmp_path, IDENTITY)):
        with pytest.raises(RunFolderError, match=rf"format 'stagewise traces {number}'.* reads .*out="):
            act()


def test_cells_whose_run_is_unknown_are_not_adopted(store):
    store.write(Cell(10, 0, "k"), make_cell())
    (store.root / "identity.json").unlink()
    with pytest.raises(RunFolderError, match="nobody knows of which run"):
        TraceStore.open(store.root, IDENTITY)


def test_a_folder_with_other_files_may_become_a_run_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    store = TraceStore.open(tmp_path, IDENTITY)
    store.write(Cell(10, 0, "k"), make_cell())
    assert TraceStore.read_only(tmp_path).steps == (10,)


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*out="):
        TraceStore.open(tmp_path / "file" / "run", IDENTITY)


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.write(Cell(10, 0, "k"), make_cell()),
        lambda store: store.lock().__enter__(),
        lambda store: store.sweep(),
    ],
)
def test_a_system_that_refuses_is_explained(store, monkeypatch, act):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr("pathlib.Path.glob", refuse)
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*Permission denied.*out="):
        act(store)
    monkeypatch.undo()
    assert store.steps == ()
    assert not list((store.root / "cells").iterdir())


@pytest.mark.parametrize(
    "moment", ["zipfile.ZipFile.writestr", "zipfile.ZipFile.close", "os.fsync", "pathlib.Path.replace"]
)
def test_a_disk_that_is_full_at_any_moment_of_a_cell_is_named_and_the_cell_is_written_whole_later(
    store, monkeypatch, tmp_path, moment
):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    other = TraceStore.open(tmp_path / "other", IDENTITY)
    other.write(Cell(10, 0, "k"), make_cell())
    with monkeypatch.context() as patch:
        patch.setattr(moment, full)
        with pytest.raises(RunFolderError, match=r"run folder .*No space left.*free some space and run again"):
            store.write(Cell(10, 0, "k"), make_cell())
    assert store.steps == ()
    assert not list((store.root / "cells").iterdir())
    store.write(Cell(10, 0, "k"), make_cell())
    assert (store.root / CELL).read_bytes() == (other.root / CELL).read_bytes()


def test_a_store_opened_to_be_read_is_not_written(store):
    store.write(Cell(10, 0, "k"), make_cell())
    reader = TraceStore.read_only(store.root)
    assert bits(reader.load(10)) == bits(make_cell())
    for act in (lambda: reader.write(Cell(11, 0, "k"), make_cell()), reader.lock, reader.sweep):
        with pytest.raises(RunFolderError, match="read only"):
            act()


# Damage and strangers.


def is_noticed(store):
    """Whether a damaged cell gives an error and no numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr wonders about foreign entries
        try:
            store.load(10)
        except (RunFolderError, KeyError):
            return True
    return False


def test_no_part_of_a_cell_can_be_lost_in_silence(store):
    store.write(Cell(10, 0, "k"), make_cell())
    cell = store.root / CELL
    whole = cell.read_bytes()
    names = list(entries(cell))
    assert len(names) > 15
    for lost in names:
        changed(cell, lambda name, content, lost=lost: None if name == lost else content)
        assert is_noticed(store), f"{lost} was lost and nobody noticed"
        cell.write_bytes(whole)
    assert bits(store.load(10)) == bits(make_cell())


def test_a_torn_cell_is_noticed_wherever_it_ends(store):
    store.write(Cell(10, 0, "k"), make_cell())
    cell = store.root / CELL
    whole = cell.read_bytes()
    for end in np.linspace(0, len(whole) - 1, 60).astype(int).tolist():
        cell.write_bytes(whole[:end])
        assert is_noticed(store), f"torn at byte {end} of {len(whole)} and nobody noticed"


def test_a_flipped_bit_changes_no_number_in_silence(store):
    store.write(Cell(10, 0, "k"), make_cell())
    cell = store.root / CELL
    whole = cell.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for place in rng.integers(len(whole), size=100).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        cell.write_bytes(damaged)
        seen = is_noticed(store)
        noticed += seen
        # The rest is in what nobody reads, such as the time of day of an entry.
        assert seen or bits(store.load(10)) == bits(make_cell()), f"byte {place} was flipped and nobody noticed"
    assert noticed > 50


def test_group_labels_are_kept_beside_the_traces_and_may_change(store):
    assert store.labels == {"train": None, "queries": {}}
    for labels in (["a", "b"], ["a", "c"]):
        store.write_labels(np.array(labels), {"val": None, "test": np.array(["x"])})
        assert TraceStore.read_only(store.root).labels == {"train": labels, "queries": {"val": None, "test": ["x"]}}


def test_damage_names_the_cell_and_the_remedy(store):
    store.write(Cell(10, 0, "k"), make_cell())
    changed(store.root / CELL, lambda name, content: None if name == "zarr.json" else content)
    for act in (lambda: store.load(10), lambda: store.is_complete(Cell(10, 0, "k")), lambda: store.attrs(10)):
        with pytest.raises(RunFolderError, match=r"cannot be read .*delete it and run again"):
            act()


@pytest.mark.parametrize("error", [MemoryError("8 GiB"), PermissionError(13, "Permission denied")])
def test_what_is_no_damage_of_the_folder_is_not_to_be_deleted(store, monkeypatch, error):
    store.write(Cell(10, 0, "k"), make_cell())

    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(store_module, "read_tree", refuse)
    with pytest.raises((MemoryError, RunFolderError), match=r"8 GiB|Permission denied") as caught:
        store.load(10)
    assert "delete" not in str(caught.value)
    assert isinstance(caught.value, MemoryError) == isinstance(error, MemoryError)


def test_pickles_in_a_strangers_cell_are_never_opened(store, tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    # Zarr version 2 takes a pickle for a compressor; older numcodecs open it without asking.
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    cell = store.root / CELL
    shape = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C", "fill_value": None}
    codecs = {"filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}}
    with zipfile.ZipFile(cell, "w") as archive:
        archive.writestr(".zgroup", '{"zarr_format": 2}')
        archive.writestr(".zattrs", '{"stagewise": {"key": "k", "contents": {"": ["trap"]}}}')
        archive.writestr("trap/.zarray", json.dumps(shape | codecs))
        archive.writestr("trap/0", Pickle().encode(np.array([Trap()], dtype=object)))
    with pytest.raises(RunFolderError):
        store.load(10)
    assert not (tmp_path / "trapped").exists()
    with suppress(Exception):
        zarr.open_group(ZipStore(cell, mode="r"), mode="r")["trap"][:]
    assert (tmp_path / "trapped").exists()  # so the trap does work


# Leftovers.


def test_sweep_removes_leftovers_and_nothing_else(store):
    store.write(Cell(10, 0, "k"), make_cell())
    before = files(store.root)
    (store.root / "kept").mkdir()
    (store.root / "executor" / "said").mkdir(parents=True)
    of_a_living_job = store.root / "executor" / "said" / ".partial-cell-1"
    of_a_living_job.touch()
    for name in ("cells/.partial-00000011-0000.zip-1-a", ".partial-identity.json-1", "kept/.partial-exact.json-1"):
        (store.root / name).write_text("{")
    (store.root / "kept" / ".partial-folder").mkdir()
    (store.root / "kept" / ".partial-folder" / "file").touch()
    store.sweep()
    of_a_living_job.unlink()
    assert files(store.root) == before
    assert not list((store.root / "kept").iterdir())
    assert {path.name for path in (store.root / "cells").iterdir()} == {"00000010-0000.zip"}


def test_an_orphaned_writer_that_was_swept_does_not_publish_what_is_left(store, monkeypatch):
    monkeypatch.setattr(files_module, "fsync", lambda _partial: store.sweep())
    with pytest.raises(SweptError, match="swept by another run"):
        store.write(Cell(10, 0, "k"), make_cell())
    assert store.steps == ()
    assert not list((store.root / "cells").iterdir())


def test_a_writer_that_comes_second_with_the_same_cell_is_content(store, monkeypatch):
    other = TraceStore.open(store.root, IDENTITY)

    def be_overtaken(_partial):
        monkeypatch.undo()
        other.write(Cell(10, 0, "k"), make_cell())

    monkeypatch.setattr(files_module, "fsync", be_overtaken)
    store.write(Cell(10, 0, "k"), make_cell())
    assert bits(store.load(10)) == bits(make_cell())
    assert [path.name for path in (store.root / "cells").iterdir()] == ["00000010-0000.zip"]
