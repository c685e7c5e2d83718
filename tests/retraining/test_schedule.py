import pytest
import torch

from stagewise.retraining.schedule import BatchOrder, Change, Schedule


def test_weights_are_one_outside_the_window_and_change_at_its_first_and_last_step_only():
    schedule = Schedule.window([1, 3], start=5, length=2, weight=0.8)
    for step in (0, 4, 7):
        assert schedule.weights(step, 4).tolist() == [1, 1, 1, 1]
    for step in (5, 6):
        assert schedule.weights(step, 4).tolist() == [1, 0.8, 1, 0.8]


def test_the_unchanged_schedule_is_one_everywhere():
    assert Schedule().weights(123, 3).tolist() == [1, 1, 1]


def test_the_later_of_overlapping_changes_holds():
    whole = Change(0, 10, torch.tensor([0, 1]), 0.5)
    part = Change(4, 6, torch.tensor([1]), 2.0)
    assert Schedule((whole, part)).weights(4, 3).tolist() == [0.5, 2.0, 1.0]
    assert Schedule((whole, part)).weights(6, 3).tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("sample", [-1, 4])
def test_samples_that_do_not_exist_are_named(sample):
    with pytest.raises(ValueError, match=f"sample {sample}, but there are 4"):
        Schedule.window([0, sample], 0, 1, 0.5).weights(0, 4)


def test_weights_of_all_samples_or_tokens_hold_during_their_window():
    for weights in (torch.tensor([0.5, 1.0, 2.0]), torch.tensor([[0.5, 1.0], [3.0, 0.0]])):
        schedule = Schedule.of_weights(weights, start=4, length=2)
        assert torch.equal(schedule.weights(5, len(weights)), weights.double())
        assert (schedule.weights(6, len(weights)) == 1).all()


def test_weights_that_are_not_one_for_each_sample_are_refused():
    with pytest.raises(ValueError, match=r"weights \(3,\) for samples \(2,\)"):
        Schedule.window([0, 1], 0, 1, torch.ones(3))


@pytest.mark.parametrize(("start", "length", "weight"), [(0, 0, 0.5), (-1, 2, 0.5), (0, 1, float("nan"))])
def test_empty_windows_and_weights_that_are_no_numbers_are_refused(start, length, weight):
    with pytest.raises(ValueError, match=r"start|finite"):
        Schedule.window([0], start, length, weight)


def test_every_epoch_visits_each_sample_at_most_once_in_a_new_order():
    order = BatchOrder(n=10, batch_size=3, seed=1)
    epochs = [torch.cat([order(3 * epoch + k) for k in range(3)]) for epoch in range(4)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_the_order_does_not_depend_on_which_steps_were_asked_before():
    forward = [BatchOrder(10, 3, 1)(step).tolist() for step in range(12)]
    backward = [BatchOrder(10, 3, 1)(step).tolist() for step in reversed(range(12))]
    assert forward == backward[::-1]
    assert forward != [BatchOrder(10, 3, 2)(step).tolist() for step in range(12)]


def test_the_epoch_of_one_seed_is_not_the_epoch_of_a_neighbouring_seed():
    assert BatchOrder(50, 50 - 1, seed=0)(1).tolist() != BatchOrder(50, 50 - 1, seed=1)(0).tolist()


@pytest.mark.parametrize("batch_size", [0, None, 10, 11])
def test_a_full_batch_is_the_whole_training_set(batch_size):
    assert BatchOrder(10, batch_size)(7).tolist() == list(range(10))
