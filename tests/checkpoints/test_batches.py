"""The samples of every update: as a loop gives them, as a file keeps them, and as a trajectory hands them on."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import batches as inputs
from small_runs import net, update

from stagewise.checkpoints import Checkpoint, CheckpointError, Recorder, Trajectory, directory, write_checkpoint
from stagewise.checkpoints.batches import sample_indices

PARAMS = {"w": torch.ones(1)}


def listed(batches):
    return [batch.tolist() for batch in batches]


def as_batches(*rows):
    return tuple(torch.tensor(row) for row in rows)


def run(folder, steps, calls, optimizer=torch.optim.SGD, **settings):
    """One update for every entry of ``calls``, which are the indices given to the recorder."""
    model = net()
    optimizer = optimizer(model.parameters(), lr=0.1)
    record = Recorder(folder, model, optimizer, steps, **settings)
    record(0)
    for step, (batch, indices) in enumerate(zip(inputs(len(calls)), calls, strict=True), start=1):
        update(model, optimizer, batch)
        record(step, indices)
    return Trajectory.from_directory(folder)


def test_every_way_to_write_the_samples_of_an_update_is_recorded_as_the_same_integers(tmp_path):
    ways = [
        torch.tensor([3, 1, 2], dtype=torch.int32),
        [3, 1, 2],
        (np.int64(3), 1, np.int32(2)),
        np.array([3, 1, 2], dtype=np.uint8),
        [torch.tensor([3, 1]), torch.tensor([2])],
        ([3], np.array([1, 2])),
        [torch.tensor(3), torch.tensor(1), torch.tensor(2)],
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last = run(tmp_path, [0, len(ways)], ways, batch_size=4).load(len(ways))
    assert listed(last.batches) == [[3, 1, 2]] * len(ways)
    assert {batch.dtype for batch in last.batches} == {torch.int64}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.0, 1.0], "must be integers"),
        (torch.tensor([True, False]), "must be integers"),  # a mask, which would be taken for samples 1 and 0
        (torch.ones(2, 2, dtype=torch.long), "in a row"),
        ([], "must be integers|in a row"),
        (torch.tensor([], dtype=torch.long), "in a row"),
        (torch.tensor(3), "in a row"),
        ([1, -1], "not be negative, got -1"),
        ([[1], [-2]], "not be negative"),
        (["a"], "must be integers"),
        (7, "in a row"),
        (object(), "must be integers"),
    ],
)
def test_what_cannot_be_samples_is_named_and_costs_no_checkpoint(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        sample_indices(given)
    with pytest.warns(UserWarning, match="the samples of the update to step 1 are taken for unknown"):
        known = run(tmp_path, [0, 1, 2], [given, [4]])
    assert known.steps == (0, 1, 2)
    assert (listed(known.load(1).batches), listed(known.load(2).batches)) == ([], [[4]])


def test_a_tensor_that_the_loop_fills_anew_is_copied(tmp_path):
    reused, rows = torch.zeros(2, dtype=torch.long), []
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Recorder(tmp_path, model, optimizer, [0, 3])
    record(0)
    for step, batch in enumerate(inputs(3), start=1):
        update(model, optimizer, batch)
        reused += step
        rows.append(reused.tolist())
        record(step, reused)
    assert listed(Trajectory.from_directory(tmp_path).load(3).batches) == rows


def test_batches_go_with_the_checkpoint_after_them_and_stop_at_a_gap(tmp_path):
    calls = [[0, 1], [2], [3, 4, 5], [6], None, [7], [8]]
    with pytest.warns(UserWarning, match="the update to step 5 were not given.* from step 4 to step 6"):
        known = run(tmp_path, [0, 2, 4, 6, 7], calls)
    checkpoints = {step: known.load(step) for step in known.steps}
    assert {step: listed(c.batches) for step, c in checkpoints.items()} == {
        0: [], 2: [[0, 1], [2]], 4: [[3, 4, 5], [6]], 6: [], 7: [[8]],
    }  # fmt: skip
    for loaded in (known, Trajectory.from_checkpoints(checkpoints.values())):
        coming = {step: listed(loaded.load(step).coming_batches) for step in known.steps}
        assert coming == {0: [[0, 1], [2], [3, 4, 5], [6]], 2: [[3, 4, 5], [6]], 4: [], 6: [[8]], 7: []}


def test_a_run_that_never_gives_samples_is_not_reminded_of_them(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path, [0, 2], [None, None]).load(2).batches == ()


def test_updates_without_a_call_leave_the_stretch_unknown(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Recorder(tmp_path, model, optimizer, [0, 2])
    record(0)
    for batch in inputs(2):
        update(model, optimizer, batch)
    with pytest.warns(UserWarning, match="the update to step 1 were not given"):
        record(2, [2])
    assert Trajectory.from_directory(tmp_path).load(2).batches == ()


def test_a_step_whose_update_was_skipped_has_no_batches_that_a_replay_would_train_on(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Recorder(tmp_path, model, optimizer, [0, 2])
    record(0)
    update(model, optimizer, inputs(1)[0])
    record(1, [1])
    with pytest.warns(UserWarning, match="Learning rates and samples are not recorded"):
        record(2, [2])
    assert Trajectory.from_directory(tmp_path).load(2).batches == ()


def test_a_run_that_went_back_forgets_the_updates_it_has_undone(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = Recorder(tmp_path, model, optimizer, [0, 1, 3])
    record(0)
    batch = inputs(1)[0]
    for step in (1, 2):
        update(model, optimizer, batch)
        record(step, [step])
    with pytest.warns(UserWarning, match="step 1 comes after step 2"):
        record(1, [7])
    for step in (2, 3):
        update(model, optimizer, batch)
        record(step, [10 * step])
    known = Trajectory.from_directory(tmp_path)
    assert (listed(known.load(1).batches), listed(known.load(3).batches)) == ([], [[20], [30]])


def test_only_batches_larger_than_the_size_given_are_named_because_an_epoch_ends_with_a_smaller_one(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, [0, 2], [[0, 1], [2]], batch_size=2)
    with pytest.warns(UserWarning, match="step 2 used 3 samples, but batch_size is 2") as caught:
        run(tmp_path, [0, 3], [[0, 1], [2, 3, 4], [5, 6, 7]], batch_size=2)
    assert len(caught) == 1


def test_weights_alone_have_their_batches_too(tmp_path):
    record = Recorder(tmp_path, net(), None, [0, 1])
    record(0)
    record(1, [5])
    assert listed(Trajectory.from_directory(tmp_path).load(1).batches) == [[5]]


def test_samples_are_kept_only_as_long_as_a_checkpoint_will_say_them(tmp_path):
    record = Recorder(tmp_path, net(), None, [2, 4])
    for step in range(10):
        record(step, [step])
        assert len(record._batches._kept) <= 2
    known = Trajectory.from_directory(tmp_path)
    assert (listed(known.load(2).batches), listed(known.load(4).batches)) == ([], [[3], [4]])


def test_a_file_keeps_batches_of_any_size_and_the_digest_is_that_of_the_weights(tmp_path):
    written = Checkpoint(3, PARAMS, batches=as_batches([2**40, 0], [5], [1, 1, 1]))
    path = write_checkpoint(tmp_path, written)
    read = directory.read_checkpoint(path, 3)
    assert listed(read.batches) == [[2**40, 0], [5], [1, 1, 1]]
    assert read.digest == written.digest == Checkpoint(3, PARAMS).digest == read.followed_by((), read.batches).digest
    with safe_open(path, "pt") as file:
        assert {name: file.get_tensor(name).dtype for name in file.keys() if "batches" in name} == {  # noqa: SIM118
            "batches/samples": torch.int64,
            "batches/sizes": torch.int64,
        }
    plain = write_checkpoint(tmp_path / "plain", replace(written, batches=()))
    with safe_open(plain, "pt") as file:
        assert list(file.keys()) == ["params/w"]


def test_a_checkpoint_does_not_follow_tensors_that_somebody_changes():
    row = torch.tensor([1, 2])
    checkpoint = Checkpoint(1, PARAMS, batches=(row,))
    row.zero_()
    assert listed(checkpoint.batches) == [[1, 2]]


@pytest.mark.parametrize(
    ("samples", "sizes", "message"),
    [
        ([1, 2, 3], [1, 1], "add up to 2 samples, but 'batches/samples' has 3"),
        ([1, 2], [3], "add up to 3 samples"),
        ([1, -2], [2], "batches/samples must not be negative, got -2"),
        ([1, 2], [3, -1], "batches/sizes must not be negative, got -1"),
        ([1, 2], [2, 0], "a batch without samples"),
        ([1.0, 2.0], [2], "must be integers"),
        ([[1, 2]], [2], "in a row"),
        ([1, 2], None, "has 'batches/samples' alone"),
        (None, [2], "has 'batches/sizes' alone"),
    ],
)
def test_damaged_batches_are_refused_where_they_are_read_and_unknown_to_the_checkpoints_before(
    tmp_path, samples, sizes, message
):
    write_checkpoint(tmp_path, Checkpoint(0, PARAMS))
    path = write_checkpoint(tmp_path, Checkpoint(1, PARAMS))
    tensors = {"params/w": PARAMS["w"]}
    tensors |= {} if samples is None else {"batches/samples": torch.tensor(samples)}
    tensors |= {} if sizes is None else {"batches/sizes": torch.tensor(sizes)}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    known = Trajectory.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match=f"step_00000001.safetensors.*{message}"):
        known.load(1)
    assert known.load(0).coming_batches == ()


def test_without_batches_loading_looks_into_one_later_file_and_never_reads_its_weights(tmp_path, monkeypatch):
    for step in range(5):
        write_checkpoint(tmp_path, Checkpoint(step, PARAMS, learning_rates=(0.1,) * min(step, 1)))
    looked, known = [], Trajectory.from_directory(tmp_path)
    monkeypatch.setattr(directory, "read_batches", lambda path: looked.append(path.name) or ())
    read = []
    monkeypatch.setattr(directory, "read_weights", lambda path, wanted: read.append(path.name) or ({}, {}))
    known.load(0)
    assert looked == ["step_00000001.safetensors"]
    assert read == ["step_00000000.safetensors"]


def test_other_names_of_the_parameters_leave_the_batches_alone():
    checkpoint = Checkpoint(1, PARAMS, batches=as_batches([1])).followed_by((0.5,), as_batches([2], [3]))
    renamed = checkpoint.renamed({"w": "v"})
    assert (listed(renamed.batches), listed(renamed.coming_batches)) == ([[1]], [[2], [3]])
    assert renamed.coming_rates == (0.5,)
