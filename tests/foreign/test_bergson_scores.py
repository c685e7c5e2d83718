"""Score stores of bergson: what its writer wrote is what is read, and nothing that is not whole."""

import json

import numpy as np
import pytest
import torch
import yaml

import stagewise as sw
import written

SCORES = np.random.default_rng(0).standard_normal((6, 3))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_helpful_scores_become_negative_influence_in_every_precision(tmp_path, kind):
    found = sw.read_scores(written.bergson(tmp_path / "scores", SCORES, kind))
    stored = torch.tensor(SCORES).to(getattr(torch, kind)).double().numpy()
    np.testing.assert_array_equal(found.values, -stored)
    assert found.dims == ("train", "query")
    assert found.attrs["tool"] == "bergson 2.5.1"
    assert found.attrs["units"] == "arbitrary unit"


def test_a_folder_that_says_lower_is_better_keeps_its_sign_and_cannot_be_overruled(tmp_path):
    folder = written.bergson(tmp_path / "scores", SCORES, "float64", higher_is_better=False)
    np.testing.assert_array_equal(sw.read_scores(folder).values, SCORES)
    with pytest.raises(ValueError, match="says that helpful is negative, but positive was given"):
        sw.read_scores(folder, helpful="positive")


def test_higher_is_better_where_an_old_configuration_does_not_name_it_as_bergson_itself_reads_it(tmp_path):
    folder = written.bergson(tmp_path / "scores", SCORES, "float64")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["steps"][0]["score"]["score_cfg"]["higher_is_better"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    np.testing.assert_array_equal(sw.read_scores(folder).values, -SCORES)


@pytest.mark.parametrize("config", [None, "magic_cfg"])
def test_scores_of_unknown_sign_are_refused_until_it_is_said(tmp_path, config):
    folder = written.bergson(tmp_path / "scores", SCORES, "float64", config)
    with pytest.raises(ValueError, match="does not say whether helpful"):
        sw.read_scores(folder)
    np.testing.assert_array_equal(sw.read_scores(folder, helpful="negative").values, SCORES)


def test_tokens_are_summed_by_document_and_a_document_without_tokens_is_zero(tmp_path):
    found = sw.read_scores(written.bergson(tmp_path / "scores", SCORES, "float64", offsets=[0, 2, 2, 6]))
    np.testing.assert_allclose(found.values, -np.stack([SCORES[:2].sum(0), np.zeros(3), SCORES[2:].sum(0)]))


def test_rows_of_candidates_go_by_their_number(tmp_path):
    found = sw.read_scores(written.bergson(tmp_path / "scores", SCORES, candidates=[1, 2, 5, 7, 8, 9]))
    assert found["train"].values.tolist() == [1, 2, 5, 7, 8, 9]


def test_a_run_that_was_killed_while_scoring_is_refused_with_how_many_are_missing(tmp_path):
    folder = written.bergson(tmp_path / "scores", SCORES, unwritten=(0, 4))
    with pytest.raises(ValueError, match="2 of 6 scores of query 0 were never written"):
        sw.read_scores(folder)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    folder = written.bergson(tmp_path / "scores", SCORES)
    content = (folder / "scores.bin").read_bytes()
    for cut in (len(content) * 5 // 6, len(content) - 3, 0):
        (folder / "scores.bin").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"5 rows, where info.json says 6|cannot be read as scores of bergson"):
            sw.read_scores(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_rows": None},
        {"num_scores": 4},
        {"num_scores": 0},
        {"dtype": "float32"},
        {"dtype": {"names": ["score_0"], "formats": ["O"], "offsets": [0], "itemsize": 8}, "num_scores": 1},
        {"dtype": {"names": ["score_0", "written_0"], "formats": ["O", "bool"], "offsets": [0, 8], "itemsize": 16}},
    ],
)
def test_another_layout_is_refused_and_bytes_are_never_taken_for_objects(tmp_path, change):
    folder = written.bergson(tmp_path / "scores", SCORES[:, :1])
    info = json.loads((folder / "info.json").read_text()) | change
    (folder / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="cannot be read as scores of bergson"):
        sw.read_scores(folder)


def test_offsets_that_are_pickled_are_refused_and_not_run(tmp_path):
    folder = written.bergson(tmp_path / "scores", SCORES, offsets=[0, 2, 6])
    np.save(folder / "offsets.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="offsets.npy"):
        sw.read_scores(folder)


@pytest.mark.parametrize("text", ["- a", "steps: 3", "steps: [{score: 3}]", "!!python/object/apply:os.getcwd []", "{"])
def test_a_configuration_of_something_else_is_a_line(tmp_path, text):
    folder = written.bergson(tmp_path / "scores", SCORES)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="cannot be read as a configuration of bergson"):
        sw.read_scores(folder)
