"""What is stored is what comes back."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from stagewise.results import Exemplar
from stagewise.run.folder import load_results, provenance, save_results

ODD = ["", 'say "no"\n', "<b>&", "é 😀 \u202e", "\ud800", "nan", "x:1", "a/b"]


def labelled(values, **attrs):
    return xr.Dataset(
        {"value": (("step", "query"), values, {"units": "nats"})},
        {
            "step": np.arange(len(values)),
            "query": ODD[: values.shape[1]],
            "size": ("query", np.arange(values.shape[1])),
        },
        attrs,
    )


@pytest.mark.parametrize(
    "dataset",
    [
        labelled(np.arange(24.0).reshape(3, 8)),
        labelled(np.array([[np.nan, np.inf], [-np.inf, -0.0]], np.float32)),
        labelled(np.zeros((0, 3))),
        labelled(np.zeros((2, 0))),
        labelled(np.array([[True, False]])),
        labelled(np.array([[0.1 + 0.2, 1e-320, 1e300]]), omitted=json.dumps({"5": "no"}), weight=0.8, window=3),
        xr.Dataset({"verdict": ("step", np.array(["ok", "not 'localised'"], object)), "n": 3}, {"step": [1, 2]}),
        xr.Dataset(),
        labelled(np.append(np.arange(2.0**17), [np.nan, -0.0, 1e-320, np.inf]).reshape(-1, 4)),
    ],
)
def test_datasets_come_back_with_their_values_types_labels_and_attributes(tmp_path, dataset):
    save_results(tmp_path, {"measured": dataset}, [])
    back = load_results(tmp_path)[0]["measured"]
    xr.testing.assert_identical(back, dataset)
    assert {name: v.dtype for name, v in back.variables.items()} == {n: v.dtype for n, v in dataset.variables.items()}


def exemplar(**changes):
    made = {"query": ODD[1], "step": 7, "samples": [3, 1], "labels": ["\ud800", "2"], "values": [-1.5, float("nan")]}
    return Exemplar(**made | {"stderrs": [0.5, 0.25]} | changes)


def test_exemplars_come_back_in_order_with_their_pictures(tmp_path):
    pictures = np.linspace(0, 1, 24).reshape(2, 3, 4)
    save_results(tmp_path, {}, [exemplar(), exemplar(query="second", images=pictures)])
    first, second = load_results(tmp_path)[1]
    assert vars(first) == vars(exemplar()) | {"values": first.values}
    np.testing.assert_array_equal(first.values, exemplar().values)
    assert second.query == "second"
    np.testing.assert_allclose(second.images, pictures, atol=5e-5)


def test_exemplars_come_back_with_their_tokens_and_from_files_that_know_none(tmp_path):
    nothing = float("nan")
    tokens = {"texts": [ODD, ["\r\n"]], "token_values": [[nothing, *[1.25e-9] * (len(ODD) - 1)], [-1.0]]}
    save_results(tmp_path, {}, [exemplar(**tokens)])
    path = tmp_path / "results" / "exemplars.json"
    (back,) = load_results(tmp_path)[1]
    assert back.texts == tokens["texts"]
    np.testing.assert_array_equal(np.concatenate(back.token_values), np.concatenate(tokens["token_values"]))
    old = [{k: v for k, v in entry.items() if k not in tokens} for entry in json.loads(path.read_text())]
    path.write_text(json.dumps(old))
    (back,) = load_results(tmp_path)[1]
    assert (back.texts, back.token_values) == (None, None)


def test_new_results_take_the_place_of_all_older_ones_and_of_a_torn_attempt(tmp_path):
    save_results(tmp_path, {"losses": labelled(np.ones((1, 1))), "baseline x": labelled(np.ones((1, 1)))}, [exemplar()])
    (tmp_path / ".results-partial").mkdir()
    (tmp_path / ".results-partial" / "torn.json").write_text("{")
    save_results(tmp_path, {"losses": labelled(np.zeros((1, 1)))}, [])
    datasets, exemplars = load_results(tmp_path)
    assert list(datasets) == ["losses"]
    assert datasets["losses"]["value"].item() == 0
    assert exemplars == []
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_run_without_results_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results yet.*stagewise run .*config\.yaml"):
        load_results(tmp_path)


def test_provenance_names_the_versions_that_computed():
    found = provenance()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == np.__version__
    assert found["xarray"] == xr.__version__
    assert {"stagewise", "scipy", "zarr", "arviz-stats", "python", "machine"} <= set(found)
    assert found["written"].endswith("+00:00")
    json.dumps(found)
