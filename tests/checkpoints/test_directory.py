"""Writing our format, reading everybody else's, and saying what is wrong with a file."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

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


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (3, 4), "layer.bias": (3,), "scale": ()}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


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


# Folders that people already have.


def wrapped(key: str):
    return lambda state, path: torch.save({"epoch": 1, key: state, "optimizer": {"lr": 0.1}}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("epoch2_step7.safetensors", save_file),
        ("7.pt", torch.save),
        ("net-7.pth", torch.save),
        ("weights.0007.bin", torch.save),
        ("a7.pt", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
        ("a7.pt", wrapped("model")),
        ("a7.pt", wrapped("state_dict")),
        ("a7.pt", wrapped("model_state_dict")),
        ("checkpoint-7/model.safetensors", save_file),
        ("step7/pytorch_model.bin", torch.save),
        ("run2_iter7/model.safetensors", save_file),
    ],
)
def test_foreign_layouts_give_weights_and_no_optimizer(tmp_path, name, save):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save(tensors(), path)
    run = Trajectory.from_directory(tmp_path)
    checkpoint = run.load(7)
    assert run.steps == (7,)
    assert_same(checkpoint.params, tensors())
    assert (checkpoint.optimizer, checkpoint.first_moment, checkpoint.second_moment) == (None, {}, {})


def test_safetensors_is_preferred_where_a_folder_has_both(tmp_path):
    (tmp_path / "step512").mkdir()
    save_file(tensors(), tmp_path / "step512" / "model.safetensors")
    (tmp_path / "step512" / "pytorch_model.bin").write_bytes(b"not read")
    assert scan(tmp_path) == {512: tmp_path / "step512" / "model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_precision_becomes_float32_exactly(tmp_path, dtype):
    half = tensors(0, dtype)
    torch.save(half, tmp_path / "1.pt")
    save_file(half, tmp_path / "2.safetensors")
    for step, path in scan(tmp_path).items():
        assert_same(read_checkpoint(path, step).params, {name: t.float() for name, t in half.items()})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.bias = nn.Parameter(torch.zeros(0))
        self.empty = nn.Parameter(torch.zeros(0))


def test_weights_tied_in_a_torch_save_keep_only_the_name_that_moves(tmp_path):
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "1.pt")
    assert set(read_checkpoint(tmp_path / "1.pt", 1).params) == {name for name, _ in model.named_parameters()}
    assert "head.weight" in model.state_dict()


def test_slices_of_one_storage_are_not_mistaken_for_tied_weights(tmp_path):
    joint = torch.arange(6.0)
    torch.save({"q": joint[:3], "k": joint[3:], "all": joint, "square": joint.view(2, 3)}, tmp_path / "1.pt")
    assert set(read_checkpoint(tmp_path / "1.pt", 1).params) == {"q", "k", "all", "square"}


def test_a_mask_of_minus_infinity_is_let_through(tmp_path):
    mask = torch.full((3, 3), -torch.inf).triu(1)
    save_file({"mask": mask}, tmp_path / "1.safetensors")
    assert_same(read_checkpoint(tmp_path / "1.safetensors", 1).params, {"mask": mask})


def test_what_lies_beside_the_weights_is_passed_over(tmp_path):
    path = write_checkpoint(tmp_path, Checkpoint(1, tensors()))
    cut_off = [".step_00000002.safetensors.0f.partial", ".tmpPnYtj4", ".hidden_3.pt"]
    for name in [*cut_off, "training_args.bin", "optimizer.pt", "rng_state_0.pth", "log.txt", "config.json"]:
        (tmp_path / name).touch()
    for name in ["tmp-checkpoint-500", "logs2"]:
        (tmp_path / name).mkdir()
    save_file(tensors(), tmp_path / "tmp-checkpoint-500" / "model.safetensors")
    assert scan(tmp_path) == {1: path}


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


@pytest.mark.parametrize("name", ["final.pt", "model.safetensors", "best/model.safetensors"])
def test_a_name_without_a_step_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path / name} has no step in its name; rename it"):
        scan(tmp_path)


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
    ],
)
def test_a_header_of_another_version_or_a_broken_one_is_named(tmp_path, metadata, reason):
    save_file({"params/w": torch.ones(1)}, tmp_path / "1.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"1.safetensors .*{reason}"):
        read_checkpoint(tmp_path / "1.safetensors", 1)


def test_other_tools_can_read_what_we_write(tmp_path):
    path = write_checkpoint(tmp_path, Checkpoint(1, {"w": torch.ones(2)}, SGD, {"w": torch.zeros(2)}))
    assert set(load_file(path)) == {"params/w", "first_moment/w"}


def test_save_model_of_safetensors_is_read(tmp_path):
    model = nn.Linear(2, 2)
    save_model(model, str(tmp_path / "step1.safetensors"))
    assert_same(read_checkpoint(tmp_path / "step1.safetensors", 1).params, dict(model.state_dict()))
