"""Writing our format, reading everybody else's, and saying what is wrong with a file."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import assert_same, tensors
from torch import nn

from stagewise.checkpoint import ParameterGroup
from stagewise.checkpoints import (
    Checkpoint,
    CheckpointError,
    Optimizer,
    Trajectory,
    read_checkpoint,
    scan,
    write_checkpoint,
)

ADAMW = Optimizer("adam", 1 / 3, betas=(0.85, 0.987), eps=1e-7, weight_decay=0.1, decoupled=True, batch_size=64)
SGD = Optimizer("sgd", 0.1, momentum=0.9, batch_size=0)


@pytest.mark.parametrize("optimizer", [ADAMW, SGD, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_keeps_every_bit_of_weights_moments_and_settings(tmp_path, optimizer, dtype):
    params = tensors(0, dtype) | {"bn.num_batches_tracked": torch.tensor(7)}
    written = Checkpoint(42, params, optimizer, tensors(1, dtype), tensors(2, dtype))
    path = write_checkpoint(tmp_path, written)
    read = read_checkpoint(path, 42)
    assert path == tmp_path / "step_00000042.safetensors"
    assert (read.step, read.optimizer) == (42, optimizer)
    assert_same(read.params, written.params)
    assert_same(read.first_moment, written.first_moment)
    assert_same(read.second_moment, written.second_moment)
    assert read.digest == written.digest


def test_round_trip_keeps_every_field(tmp_path):
    groups = (ParameterGroup(("layer.weight", "scale"), 0.0, 0.1), ParameterGroup(("layer.bias",), 1 / 7))
    rule = replace(ADAMW, groups=groups, clip_norm=1 / 3)
    written = Checkpoint(
        5,
        tensors(0),
        rule,
        tensors(1),
        tensors(2),
        update_counts={"layer.bias": 0, "scale": 1005},
        train_mode=("BatchNorm1d", "Dropout"),
        learning_rates=(1 / 3, 0.0, 1e-300),
    )
    read = read_checkpoint(write_checkpoint(tmp_path, written), 5)
    assert read.optimizer == rule
    for name in ("update_counts", "train_mode", "learning_rates"):
        assert getattr(read, name) == getattr(written, name)
        assert type(getattr(read, name)) is type(getattr(written, name))
    assert set(read.params) == set(tensors())
    assert read.digest == written.digest


def test_a_million_learning_rates_are_no_burden_to_the_header(tmp_path):
    rates = tuple(torch.linspace(0, 1, 10**6, dtype=torch.float64).tolist())
    path = write_checkpoint(tmp_path, Checkpoint(10**6, {}, learning_rates=rates))
    assert read_checkpoint(path, 10**6).learning_rates == rates
    assert int.from_bytes(path.read_bytes()[:8], "little") < 1000


def test_files_of_the_first_version_are_read(tmp_path):
    # Byte by byte what was written before a checkpoint knew groups, counts, layers in train mode and rates.
    rule = (
        '{"name": "adam", "learning_rate": 0.01, "momentum": 0.0, "betas": [0.8, 0.95], "eps": 1e-06, '
        '"weight_decay": 0.1, "decoupled": true, "batch_size": 8}'
    )
    moments = {f"{part}/w": torch.full((2,), value) for part, value in (("first_moment", 2.0), ("second_moment", 3.0))}
    metadata = {"format": "stagewise-checkpoint-1", "step": "3", "optimizer": rule}
    save_file({"params/w": torch.ones(2), **moments}, tmp_path / "step_00000003.safetensors", metadata)
    checkpoint = Trajectory.from_directory(tmp_path).load(3)
    assert checkpoint.optimizer == Optimizer(
        "adam", 0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, decoupled=True, batch_size=8
    )
    assert_same(checkpoint.second_moment, {"w": torch.full((2,), 3.0)})
    assert (checkpoint.update_counts, checkpoint.train_mode, checkpoint.learning_rates) == ({}, (), ())


def test_tied_transposed_and_expanded_tensors_are_written_by_value(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    params = {"a": weight, "tied": weight, "transposed": weight.T, "expanded": torch.ones(1).expand(4)}
    assert_same(read_checkpoint(write_checkpoint(tmp_path, Checkpoint(0, params)), 0).params, params)


def test_the_digest_tells_apart_whatever_is_recorded():
    w = {"w": torch.ones(2)}
    checkpoints = [
        Checkpoint(1, w),
        Checkpoint(2, w),
        Checkpoint(1, w, SGD),
        Checkpoint(1, w, first_moment=w),
        Checkpoint(1, w, second_moment=w),
        Checkpoint(1, {"v": torch.ones(2)}),
    ]
    assert len({checkpoint.digest for checkpoint in checkpoints}) == len(checkpoints)


def test_a_parameter_name_with_a_slash_survives(tmp_path):
    params = {"params/odd/name": torch.ones(2)}
    assert_same(read_checkpoint(write_checkpoint(tmp_path, Checkpoint(0, params)), 0).params, params)


def test_the_same_step_is_replaced_and_nothing_else_is_left(tmp_path):
    write_checkpoint(tmp_path, Checkpoint(3, tensors(0)))
    path = write_checkpoint(tmp_path, Checkpoint(3, tensors(1)))
    assert list(tmp_path.iterdir()) == [path]
    assert_same(read_checkpoint(path, 3).params, tensors(1))


def test_a_write_cut_off_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, Checkpoint(3, tensors(0)))

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*step_00000003.*No space left on device"):
        write_checkpoint(tmp_path, Checkpoint(3, tensors(1)))
    assert list(tmp_path.iterdir()) == [path]
    assert_same(read_checkpoint(path, 3).params, tensors(0))


def test_files_are_as_readable_for_others_as_any_new_file(tmp_path):
    (tmp_path / "plain.txt").touch()
    path = write_checkpoint(tmp_path, Checkpoint(0, tensors()))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain.txt").stat().st_mode)


def test_a_folder_below_a_file_cannot_be_written_and_the_message_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot make the folder .*file/run: Not a directory"):
        write_checkpoint(tmp_path / "file" / "run", Checkpoint(0, tensors()))


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match=f"cannot write checkpoints to {tmp_path}: permission denied"):
        write_checkpoint(tmp_path, Checkpoint(0, tensors()))


def test_a_trajectory_is_read_in_order_of_steps_and_not_of_names(tmp_path):
    write_checkpoint(tmp_path, Checkpoint(0, tensors(0), SGD))
    for step in (100, 20):
        torch.save(tensors(step), tmp_path / f"model{step}.pt")
    run = Trajectory.from_directory(str(tmp_path))
    assert run.steps == (0, 20, 100)
    assert_same(run.load(20).params, tensors(20))


# Errors.


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such folder of checkpoints: {tmp_path / 'nowhere'}"):
        scan(tmp_path / "nowhere")


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"no checkpoints in {tmp_path}; looked for .*safetensors.*checkpoint-500"
    ):
        Trajectory.from_directory(tmp_path)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    path = write_checkpoint(tmp_path, Checkpoint(1, tensors()))
    with pytest.raises(CheckpointError, match="is a file, expected the folder"):
        scan(path)


def test_two_files_of_one_step_are_both_named(tmp_path):
    for name in ["step_7.pt", "other_07.safetensors"]:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"other_07.safetensors and .*step_7.pt are both of step 7"):
        scan(tmp_path)


def test_a_checkpoint_folder_without_readable_weights_does_not_disappear_in_silence(tmp_path):
    write_checkpoint(tmp_path, Checkpoint(1, tensors()))
    (tmp_path / "checkpoint-500").mkdir()
    save_file(tensors(), tmp_path / "checkpoint-500" / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint-500 holds neither model.safetensors nor pytorch"):
        scan(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 60, -3])
def test_truncated_safetensors_are_named(tmp_path, keep):
    path = write_checkpoint(tmp_path, Checkpoint(1, tensors()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot read .*step_00000001.safetensors, is it damaged"):
        read_checkpoint(path, 1)


@pytest.mark.parametrize("keep", [0, 300, -100])
def test_truncated_pickles_are_named(tmp_path, keep):
    torch.save(tensors(), tmp_path / "1.pt")
    (tmp_path / "1.pt").write_bytes((tmp_path / "1.pt").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cannot read .*1.pt, is it damaged"):
        read_checkpoint(tmp_path / "1.pt", 1)


@pytest.mark.parametrize("name", ["1.pt", "1.safetensors"])
def test_a_file_that_went_away_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"cannot read .*{name}.*No such file"):
        read_checkpoint(tmp_path / name, 1)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("hide", [lambda bomb: bomb, lambda bomb: {"model": tensors(), "extra": bomb}])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, hide):
    torch.save(hide(Bomb(tmp_path / "exploded")), tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=r"1.pt was refused: it asks for \w+.mkdir; .* would run code. Save"):
        read_checkpoint(tmp_path / "1.pt", 1)
    assert not (tmp_path / "exploded").exists()


def test_a_whole_pickled_module_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=r"asks for torch.nn.modules.linear.Linear.*state_dict\(\) alone"):
        read_checkpoint(tmp_path / "1.pt", 1)


def test_a_text_file_under_a_weights_name_is_refused(tmp_path):
    (tmp_path / "1.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"1.bin was refused: it is damaged, or a pickle of something"):
        read_checkpoint(tmp_path / "1.bin", 1)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({}, r"a dict with \[\]"),
        ({"epoch": 3, "model": {}}, r"a dict with \['epoch', 'model'\]"),
        ({"epoch": 3, "model": {"w": 1.0}}, r"a dict with \['epoch', 'model'\]"),
    ],
)
def test_a_pickle_without_a_state_dict_says_what_it_holds(tmp_path, content, found):
    torch.save(content, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=rf"1.pt holds {found}, expected a state dict"):
        read_checkpoint(tmp_path / "1.pt", 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named_and_counted(tmp_path, value, dtype):
    params = tensors(0, dtype)
    params["layer.bias"][:2] = value
    path = write_checkpoint(tmp_path, Checkpoint(1, params))
    with pytest.raises(CheckpointError, match=r"step_00000001.*'params/layer.bias' has 2 values that are NaN"):
        read_checkpoint(path, 1)


def test_a_renamed_checkpoint_does_not_pass_for_another_step(tmp_path):
    path = write_checkpoint(tmp_path, Checkpoint(1, tensors())).rename(tmp_path / "step_9.safetensors")
    with pytest.raises(CheckpointError, match=r"step_9.safetensors holds step 1, not 9; was it renamed"):
        Trajectory.from_directory(tmp_path).load(9)
    assert read_checkpoint(path, 1).step == 1


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"format": "stagewise-checkpoint-2"}, "is in the format 'stagewise-checkpoint-2', this version"),
        ({"format": "stagewise-checkpoint-1", "step": "1"}, r"does not follow it: KeyError\('optimizer'\)"),
        ({"format": "stagewise-checkpoint-1", "step": "1", "optimizer": "{"}, "does not follow it: JSON"),
        (
            {"format": "stagewise-checkpoint-1", "step": "1", "optimizer": '{"betas": [0, 0], "x": 1}'},
            "does not follow it: TypeError",
        ),
        (
            {"format": "stagewise-checkpoint-1", "step": "1", "optimizer": "null", "update_counts": "{"},
            "does not follow it: JSON",
        ),
    ],
)
def test_a_header_of_another_version_or_a_broken_one_is_named(tmp_path, metadata, reason):
    save_file({"params/w": torch.ones(1)}, tmp_path / "1.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"1.safetensors .*{reason}"):
        read_checkpoint(tmp_path / "1.safetensors", 1)


def test_other_tools_can_read_what_we_write(tmp_path):
    path = write_checkpoint(tmp_path, Checkpoint(1, {"w": torch.ones(2)}, SGD, {"w": torch.zeros(2)}))
    assert set(load_file(path)) == {"params/w", "first_moment/w"}
