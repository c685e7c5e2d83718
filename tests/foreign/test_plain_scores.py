"""Scores as one array in a file."""

import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import stagewise as sw

SCORES = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.5]])  # (query, train)


def write(path, scores):
    if path.suffix == ".mmap":  # as TRAK does (trak/savers.py, MmapSaver._load)
        array = np.lib.format.open_memmap(filename=path, mode="w+", shape=scores.shape, dtype=np.float32)
        array[:] = scores
        array.flush()
    elif path.suffix == ".npy":
        np.save(path, scores)
    elif path.suffix == ".npz":
        np.savez(path, scores=scores, other=np.ones(2))
    elif path.suffix == ".safetensors":
        save_file({"anything": torch.tensor(scores, dtype=torch.bfloat16)}, path)
    else:
        torch.save(torch.tensor(scores), path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".mmap", ".npz", ".safetensors", ".pt"])
def test_every_container_gives_the_same_matrix_with_our_sign(tmp_path, suffix):
    path = write(tmp_path / f"scores{suffix}", SCORES)
    np.testing.assert_array_equal(sw.read_scores(path, helpful="positive", transpose=True).values, -SCORES.T)
    found = sw.read_scores(path, helpful="negative", nats=True)
    np.testing.assert_array_equal(found.values, SCORES)
    assert found.attrs["units"] == "nats per unit weight"


def test_the_sign_of_a_plain_array_is_not_guessed(tmp_path):
    with pytest.raises(ValueError, match="does not say whether helpful"):
        sw.read_scores(write(tmp_path / "scores.npy", SCORES))
    with pytest.raises(ValueError, match="helpful must be"):
        sw.read_scores(write(tmp_path / "scores.npy", SCORES), helpful="yes")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_named(tmp_path, bad):
    scores = SCORES.copy()
    scores[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 6 scores are not finite, the first at row 1, column 2"):
        sw.read_scores(write(tmp_path / "scores.npy", scores), helpful="positive")


@pytest.mark.parametrize("scores", [np.ones(3), np.ones((2, 2, 2)), np.ones((2, 2)) * 1j, np.array([["a"]])])
def test_what_is_no_matrix_of_numbers_is_refused(tmp_path, scores):
    with pytest.raises(ValueError, match="expected a matrix of numbers"):
        sw.read_scores(write(tmp_path / "scores.npy", scores), helpful="positive")


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_nothing_is_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="expected scores"):
        sw.read_scores(write(tmp_path / "scores.npy", np.ones(shape)), helpful="positive")


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def hostile(path):
    """Files that ask for a call: a bare pickle, NumPy's and torch's; and what is no file of any kind."""
    numpy, zipped = BytesIO(), BytesIO()
    np.save(numpy, np.array([[Hostile(path)]]), allow_pickle=True)
    torch.save({"scores": Hostile(path)}, zipped)
    return [pickle.dumps(Hostile(path), 2), numpy.getvalue(), zipped.getvalue(), b"", b"PK\x03\x04 cut off"]


@pytest.mark.parametrize("suffix", [".npy", ".mmap", ".npz", ".safetensors", ".pt"])
def test_a_hostile_pickle_under_any_name_is_refused_and_not_run(tmp_path, suffix):
    ran, path = tmp_path / "ran", tmp_path / f"scores{suffix}"
    for content in hostile(ran):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as an array|would run code|expected one array"):
            sw.read_scores(path, helpful="positive")
    assert not ran.exists()


def test_several_arrays_of_which_none_is_called_scores_are_not_chosen_among(tmp_path):
    np.savez(tmp_path / "scores.npz", a=SCORES, b=SCORES)
    with pytest.raises(ValueError, match=r"expected one array, or one called 'scores', got \['a', 'b'\]"):
        sw.read_scores(tmp_path / "scores.npz", helpful="positive")


def test_a_place_without_scores_says_what_is_expected_and_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="there is no such path"):
        sw.read_scores(tmp_path / "nowhere")
    (tmp_path / "info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a folder with info.json and scores.bin.*got a folder of \['info"):
        sw.read_scores(tmp_path)
