from types import SimpleNamespace

import pytest
import torch

from stagewise.retraining import scratch
from stagewise.retraining.scratch import on_disk, room_on_disk
from stagewise.retraining.updates import TrainingState


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_come_back_with_their_bits_in_any_order_and_as_often_as_asked(tmp_path, dtype):
    def state(number):
        parts = (torch.randn(2, 5).to(dtype) * number for _ in range(3))
        return TrainingState(*parts, counts=torch.tensor([[number]]))

    states = [state(number) for number in range(3)]
    states[1].params[0, 0] = -0.0
    back = [on_disk(tmp_path, ["params", "first_moment", "second_moment"], one) for one in states]
    for number in (2, 0, 1, 1):
        got, expected = back[number](), states[number]
        for name in vars(expected):
            assert getattr(got, name).dtype == getattr(expected, name).dtype
            assert torch.equal(getattr(got, name), getattr(expected, name))
        assert torch.equal(got.params.signbit(), expected.params.signbit())


def test_what_no_update_changes_is_shared_and_not_written(tmp_path):
    zeros = torch.zeros(1, 4)
    back = on_disk(tmp_path, ["params"], TrainingState(torch.ones(1, 4), zeros, zeros, torch.zeros(1, 1)))
    assert back().first_moment is zeros


def test_nothing_is_left_for_others_to_clean_up_even_while_states_are_kept(tmp_path):
    vector = torch.ones(1, 4)
    back = on_disk(tmp_path, ["params"], TrainingState(vector, vector, vector, vector))
    assert not list(tmp_path.iterdir())
    assert torch.equal(back().params, vector)


def test_at_most_half_of_the_free_disk_is_used_and_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert room_on_disk(tmp_path / "a" / "b", 100) == 5
    assert (tmp_path / "a" / "b").is_dir()
    assert room_on_disk(tmp_path, 1) == 256, "each is an open file"
