"""Score folders of dattri-llm: rows by content hash and training step, never by their order."""

import pickle

import numpy as np
import pytest

import stagewise as sw
import written

IDS = {"train_ids": ["a", "b", "c"], "query_ids": ["x", "y"]}


@pytest.fixture
def folder(tmp_path):
    # In the order of training, which is not that of the data; b is met twice, and columns are turned round.
    scores = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    return written.dattri(tmp_path / "scores", scores, ["c", "b", "a", "b"], [10, 10, 11, 12], ["y", "x"])


def test_rows_are_summed_over_steps_and_put_in_the_order_of_the_ids(folder):
    found = sw.read_scores(folder, **IDS)
    assert found.values.tolist() == [[-6, -5], [-12, -10], [-2, -1]]
    assert found.attrs["tool"] == "dattri-llm, TracIn"
    assert found.attrs["of training steps"] == "10 to 12"


def test_a_window_keeps_its_training_steps_and_samples_outside_of_it_have_none(folder):
    assert sw.read_scores(folder, **IDS, trained=range(11, 13)).values.tolist() == [[-6, -5], [-8, -7], [0, 0]]
    assert sw.read_scores(folder, **IDS, trained=range(10, 12)).values.tolist() == [[-6, -5], [-4, -3], [-2, -1]]
    with pytest.raises(ValueError, match="no row of training steps 20 to 29; it has some of 10 to 12"):
        sw.read_scores(folder, **IDS, trained=range(20, 30))


def test_samples_of_the_same_content_share_the_score_that_was_kept_for_both(folder):
    found = sw.read_scores(folder, train_ids=["a", "b", "a"], query_ids=["x", "x"])
    assert found.values.tolist() == [[-3, -3], [-12, -12], [-3, -3]]


def test_order_is_not_guessed_and_foreign_ids_are_named(folder):
    with pytest.raises(ValueError, match="give train_ids and query_ids"):
        sw.read_scores(folder)
    with pytest.raises(ValueError, match="query_ids: 1 of 2 are not in the folder.*'z'"):
        sw.read_scores(folder, train_ids=["a"], query_ids=["x", "z"])


def test_a_hostile_pickle_is_refused_and_not_run(folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "scores.pt").write_bytes(pickle.dumps(Hostile(), 2))
    with pytest.raises(ValueError, match="unpickling anything else would run code"):
        sw.read_scores(folder, **IDS)
    assert not (tmp_path / "ran").exists()


def test_metadata_of_other_rows_is_refused(folder):
    (folder / "metadata.json").write_text((folder / "metadata.json").read_text().replace('"x"', '"x", "w"'))
    with pytest.raises(ValueError, match=r"expected shape \(4, 3\).*got \(4, 2\)"):
        sw.read_scores(folder, **IDS)


def test_what_is_said_of_folders_of_hashes_is_refused_of_others(tmp_path):
    np.save(tmp_path / "scores.npy", np.ones((3, 2)))
    with pytest.raises(ValueError, match="leave it out"):
        sw.read_scores(tmp_path / "scores.npy", helpful="positive", trained=range(3))
    with pytest.raises(ValueError, match="transpose can be said of an array"):
        sw.read_scores(written.bergson(tmp_path / "b", np.ones((3, 2))), transpose=True)
