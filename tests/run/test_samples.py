"""What the training samples are, as the page to look around in shows them."""

import json

import numpy as np
import springs
import torch

from stagewise.run import samples
from stagewise.run.folder import dataset_from_json, dataset_to_json

PICTURES = torch.arange(6.0 * 16).reshape(6, 4, 4)


def test_pictures_are_kept_from_black_to_white_over_all_samples_with_their_labels():
    found = samples.described(springs.task(train=(PICTURES,)))
    assert found["image"].dims == ("sample", "height", "width")
    assert (found["image"].min(), found["image"].max()) == (0, 255)
    np.testing.assert_allclose(found["image"].values / 255, PICTURES / PICTURES.max(), atol=0.5 / 255)
    assert found["label"].values.tolist() == list("ababab")


def test_candidates_alone_are_described_under_their_own_numbers():
    task = springs.task(train=(PICTURES,), candidates=[4, 1])
    found = samples.described(task)
    assert found["sample"].values.tolist() == task.candidates.tolist()
    assert found.sel(sample=4)["image"].mean() > found.sel(sample=1)["image"].mean()


def test_rows_of_a_table_are_kept_as_they_are():
    found = samples.described(springs.task())
    np.testing.assert_array_equal(found["row"].values, np.array(springs.TRAIN, dtype=np.float32))


def test_texts_come_back_as_their_tokens_whatever_is_in_them_and_through_the_run_folder():
    texts = [["</script>", "\ud800"], [], ["a", "\n"], ["é"], ["😀"], ["x"]]
    task = springs.task()
    task.train_texts = texts
    found = dataset_from_json(json.loads(json.dumps(dataset_to_json(samples.described(task)))))
    assert [json.loads(text) for text in found["text"].values.tolist()] == texts


def test_what_is_too_large_to_keep_leaves_labels_alone(monkeypatch):
    monkeypatch.setattr(samples, "MOST", 10)
    assert set(samples.described(springs.task(train=(PICTURES,))).data_vars) == {"label"}
    task = springs.task()
    task.train_texts = [["four", "four"]] * 6
    assert set(samples.described(task).data_vars) == {"label"}


def test_tokens_without_texts_are_described_by_their_labels_alone():
    tokens = torch.zeros(6, 8, dtype=torch.long)
    assert set(samples.described(springs.task(train=(tokens,))).data_vars) == {"label"}
