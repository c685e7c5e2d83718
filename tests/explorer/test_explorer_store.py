import json
from dataclasses import replace

import made_runs
import numpy as np
import pytest
import xarray as xr
import zarr

from stagewise.explorer import contents, store
from stagewise.explorer.contents import write_store
from stagewise.explorer.store import Store, plain
from stagewise.results import EXACT


def written(results, folder):
    write_store(results, folder / "data.zarr")
    return zarr.open_group(str(folder / "data.zarr"), mode="r")


def document(root, path):
    return json.loads((root.store.root / f"{path}.json").read_text())


def f4(data, *dims):
    return data.transpose(*dims).values.astype("<f4")


@pytest.fixture(scope="module")
def results():
    return made_runs.digits()


@pytest.fixture(scope="module")
def root(results, tmp_path_factory):
    return written(results, tmp_path_factory.mktemp("store"))


def test_every_array_is_the_dataset_it_was_made_of(root, results):
    entries = {(entry["name"], entry["of"]): entry["path"] for entry in root.attrs["influences"]}
    kept = {
        (EXACT, "group"): results.exact,
        ("BIF", "group"): results.sampled,
        (EXACT, "sample"): results.single[EXACT],
    }
    assert set(entries) == set(kept)
    for key, path in entries.items():
        for name in ("value", "stderr"):
            np.testing.assert_array_equal(root[f"{path}/{name}"][...], f4(kept[key][name], "step", "train", "query"))
        assert root[path].attrs["train"] == kept[key]["train"].values.tolist()
    np.testing.assert_array_equal(root["losses"][...], f4(results.losses["queries"], "query", "step"))
    for name in ("effect", "effect_stderr"):
        np.testing.assert_array_equal(
            root[f"measured/{name}"][...], f4(results.measured[name], "step", "train", "query")
        )
    pairs = f4(results.in_two_times["value"], "train", "query", "asked", "trained")
    np.testing.assert_array_equal(root["two_times/value"][...], pairs)
    np.testing.assert_array_equal(root["map/value"][...], f4(results.positions["value"], "step", "sample", "axis"))
    np.testing.assert_array_equal(root["draws"][...], f4(results.draws, "step", "chain", "draw"))
    np.testing.assert_array_equal(root["samples/image"][...], results.samples["image"].values)
    assert root["samples/image"].dtype == np.uint8
    names = document(root, "samples/names")
    assert names == {
        "sample": results.samples["sample"].values.tolist(),
        "label": results.samples["label"].values.tolist(),
    }


@pytest.mark.parametrize(("large", "by_step"), [(40, True), (100, False)])
def test_a_large_influence_in_pieces_is_the_same_as_a_small_one(results, tmp_path, monkeypatch, large, by_step):
    for name, size in {"LARGE": large, "_CURVES": 5, "_TOGETHER": 30, "_STRONGEST": 7}.items():
        monkeypatch.setattr(store, name, size)
    data = results.single[EXACT]  # 5 steps, 12 samples, 4 queries
    root = written(results, tmp_path)
    entry = next(one for one in root.attrs["influences"] if one["of"] == "sample")
    group = root[entry["path"]]
    assert (entry["large"], entry["by_step"]) == (True, by_step)
    assert "value" not in group
    for name in ("value", "stderr"):
        np.testing.assert_array_equal(group[f"by_query/{name}"][...], f4(data[name], "query", "train", "step"))
        if by_step:
            np.testing.assert_array_equal(group[f"by_step/{name}"][...], f4(data[name], "step", "query", "train"))
    for at, rows in enumerate(group["strongest/row"][...].astype(int)):
        reach = abs(data["value"].values[at]).max(1)
        assert sorted(rows) == rows.tolist()
        assert set(rows) == {*np.argsort(-reach)[:7]}
        np.testing.assert_array_equal(group["strongest/value"][at], data["value"].values[at, rows].astype("<f4"))


def test_what_is_not_finite_is_null_in_documents_and_nan_in_arrays(tmp_path):
    assert plain({"a": [np.nan, -np.inf, 1.5], 2: np.float32(np.inf), "c": np.array([1, 2])}) == {
        "a": [None, None, 1.5],
        "2": None,
        "c": [1, 2],
    }
    results = made_runs.digits()
    results.losses["train"][1] = np.nan
    results.single[EXACT]["value"][2, 1, 1] = np.nan
    root = written(results, tmp_path)
    assert root.attrs["losses"]["train"][1] is None
    assert np.argwhere(np.isnan(root["influence/2/value"][...])).tolist() == [[2, 1, 1]]
    json.loads((root.store.root / "zarr.json").read_text(), parse_constant=pytest.fail)


def test_the_order_of_likeness_holds_every_label_once_and_puts_twins_side_by_side(root, tmp_path):
    for entry in root.attrs["influences"]:
        group = root[entry["path"]]
        for dim, order in group.attrs["order"].items():
            assert sorted(order) == list(range(len(group.attrs[dim])))
    data = made_runs.influence(list("abcdef"), list("xyz"))
    data["value"][:, 5] = data["value"][:, 0] + 1e-9
    entry = Store(tmp_path / "twins").influence("of", data, {})
    order = zarr.open_group(str(tmp_path / "twins"), mode="r")[entry["path"]].attrs["order"]["train"]
    assert abs(order.index(0) - order.index(5)) == 1


def test_a_store_that_was_interrupted_leaves_the_older_one_as_it_was(results, tmp_path, monkeypatch):
    before = written(made_runs.hierarchy(), tmp_path).attrs["title"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(contents, "_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_store(results, tmp_path / "data.zarr")
    assert zarr.open_group(str(tmp_path / "data.zarr"), mode="r").attrs["title"] == before
    assert written(results, tmp_path).attrs["title"] == results.title
    assert [path.name for path in tmp_path.iterdir()] == ["data.zarr"]


def test_a_run_without_an_answer_says_why_and_has_no_influence(tmp_path):
    nothing = made_runs.influence(["a"], ["a"], steps=[], estimator="bif", omitted=json.dumps({"10": "not localised"}))
    root = written(made_runs.bare(["a"], influence=nothing, baselines={}), tmp_path)
    assert root.attrs["influences"] == []
    assert root.attrs["omitted"] == {"10": "not localised"}


def test_what_a_run_does_not_have_is_not_there(tmp_path):
    root = written(made_runs.hierarchy(), tmp_path)
    assert not {"measured", "replay", "two_times", "map", "draws", "samples"} & {*root.attrs}
    assert {path.name for path in root.store.root.iterdir()} == {"zarr.json", "exemplars.json", "influence", "losses"}
    assert document(root, "exemplars") == []


@pytest.mark.parametrize(("make", "of"), [("digits", "sample"), ("induction", "token"), ("table", "sample")])
def test_samples_and_tokens_are_known_as_such(tmp_path, make, of):
    root = written(getattr(made_runs, make)(), tmp_path)
    assert {entry["of"] for entry in root.attrs["influences"]} == {"group", of}


def test_labels_that_are_numbers_do_not_make_groups_samples(root):
    assert [entry["of"] for entry in root.attrs["influences"]] == ["group", "group", "sample"]


def test_texts_and_rows_of_samples_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_TEXTS", 2)
    root = written(made_runs.induction(), tmp_path / "texts")
    assert root.attrs["samples"]["text"] == 2
    assert document(root, "samples/text/1") == [["a", "b", "a", "c"]]
    rows = made_runs.table()
    root = written(rows, tmp_path / "rows")
    np.testing.assert_array_equal(root["samples/row"][...], rows.samples["row"].values)


def test_exemplars_are_listed_and_each_is_a_document(tmp_path):
    results = made_runs.language()
    root = written(results, tmp_path)
    listed = document(root, "exemplars")
    assert [(one["query"], one["step"]) for one in listed] == [(one.query, one.step) for one in results.exemplars]
    last = document(root, f"exemplars/{listed[-1]['document']}")
    assert last["values"] == results.exemplars[-1].values.tolist()
    assert last["token_values"] == np.asarray(results.exemplars[-1].token_values).tolist()
    assert last["texts"][0] == list(results.exemplars[-1].texts[0])


def test_colours_are_fullest_at_the_largest_influence_between_different_labels(tmp_path):
    results = made_runs.hierarchy()
    value = results.exact["value"]
    for k in range(4):
        value[:, k, k] = 50.0
    value[3, 0, 1] = -7.0
    assert written(results, tmp_path).attrs["influences"][0]["largest"] == 7.0


def test_scores_are_those_of_the_report(root, results):
    scores = next(one for one in root.attrs["agreements"] if (one["against"], one["name"]) == ("retraining", EXACT))
    expected = results.agreements[EXACT]
    for kind in ("correlation", "slope"):
        for end in ("", "_lower", "_upper"):
            assert scores[f"{kind}{end}"] == expected[f"{kind}_off_diagonal{end}"].values.tolist()


def test_chains_that_kept_no_draws_are_no_fault(tmp_path):
    empty = xr.DataArray(np.zeros((0, 4, 6)), {"step": []}, ("step", "chain", "draw"))
    assert written(made_runs.digits(draws=empty), tmp_path)["draws"].shape == (0, 4, 6)


def test_imported_scores_claim_neither_nats_nor_events(tmp_path):
    scores = made_runs.influence(made_runs.CLASSES, made_runs.CLASSES, seed=8, imported="{}", units="arbitrary unit")
    results = made_runs.digits()
    root = written(replace(results, baselines={**results.baselines, "TRAK": scores}), tmp_path)
    entries = {entry["name"]: entry for entry in root.attrs["influences"] if entry["of"] == "group"}
    trak = entries["TRAK"]
    assert (trak["rung"], trak["unit"], trak["checked"], trak["events"]) == ("imported", "arbitrary unit", False, [])
    assert entries["exact influence"]["checked"]
    assert entries["exact influence"]["events"]


def test_samples_are_held_against_what_was_measured_of_samples_and_groups_are_not(tmp_path):
    names = [str(k) for k in range(6)]
    exact = made_runs.influence(names, ["a"], sizes=1)
    measured = xr.Dataset({"effect": -exact["value"]}, attrs={"window": 30, "weight": 0.0})
    changes = {"baselines": {"exact influence": exact}, "measured": measured, "single": {"other": exact * 2}}
    results = made_runs.bare(names, ["a"], **changes)
    results.losses.attrs["curves"] = "sample"
    root = written(results, tmp_path)
    checked = {entry["name"]: (entry["of"], entry["checked"]) for entry in root.attrs["influences"]}
    assert checked == {"exact influence": ("sample", True), "other": ("sample", False)}


def test_groups_of_the_querys_own_label_are_named_for_every_query(tmp_path):
    labels = ["cat", "dog"]
    root = written(made_runs.bare(labels, ["val:dog", "val:cat", "val:all"]), tmp_path)
    assert root["influence/0"].attrs["own"] == [[1], [0], []]


def test_what_is_all_zero_is_written_too(tmp_path):
    results = made_runs.hierarchy()
    zero = {name: 0 * data for name, data in results.baselines.items()}
    root = written(replace(results, baselines=zero), tmp_path)
    assert (root.store.root / "influence" / "0" / "value" / "c" / "0" / "0" / "0").is_file()
