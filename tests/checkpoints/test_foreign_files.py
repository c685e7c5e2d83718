"""Folders that people already have, and what of their names and files can be understood without a guess."""

import json

import pytest
import torch
from safetensors.torch import save_file, save_model
from small_runs import assert_same, tensors
from torch import nn

from stagewise.checkpoints import Checkpoint, CheckpointError, Trajectory, read_checkpoint, scan, write_checkpoint

STEPS = {
    # The word and the integer, whatever stands between them.
    "step_00000042.safetensors": 42,
    "step42.pt": 42,
    "STEP-42.pth": 42,
    "Step=42.bin": 42,
    "step.42.pt": 42,
    "checkpoint-42.pt": 42,
    "ckpt_42.pt": 42,
    "iter42.pt": 42,
    "iteration_42.pt": 42,
    "global_step42.pt": 42,
    "GLOBAL_STEP_42.pt": 42,
    "ckpt-steps-42.pt": 42,
    # Other integers beside it.
    "epoch_3_step_42.pt": 42,
    "epoch=3-step=42.ckpt": 42,
    "epoch3step42.ckpt": 42,
    "epoch=3-step=42-v1.ckpt": 42,
    "step_42_loss_0.31.pt": 42,
    "pythia-70m-step42.safetensors": 42,
    "resnet18_ckpt_42.pt": 42,
    "checkpoint-42-step-42.pt": 42,
    "run2_iter_42.pt": 42,
    # No such word: the only integer.
    "42.pt": 42,
    "model_42.pt": 42,
    "epoch_42.pt": 42,
    "weights.0042.bin": 42,
    "timestamp42.pt": 42,
    "model_42.ckpt": 42,
}


@pytest.mark.parametrize("name", STEPS)
def test_the_step_is_the_integer_behind_its_word_or_the_only_one(tmp_path, name):
    (tmp_path / name).touch()
    assert scan(tmp_path) == {STEPS[name]: tmp_path / name}


@pytest.mark.parametrize("name", [name.rsplit(".", 1)[0] for name in STEPS])
def test_folders_are_called_like_files(tmp_path, name):
    (tmp_path / name).mkdir()
    save_file(tensors(), tmp_path / name / "model.safetensors")
    assert list(scan(tmp_path)) == [42]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet18_500.pt", "18 or 500"),
        ("gpt2-500.safetensors", "2 or 500"),
        ("epoch3_loss0.25.pt", "0 or 3 or 25"),
        ("step_10_iter_20.pt", "10 or 20"),
        ("checkpoint-3-step-500.pt", "3 or 500"),
        ("2024-05-01.pt", "1 or 5 or 2024"),
        ("timestep5_20.pt", "5 or 20"),
    ],
)
def test_a_name_that_leaves_a_choice_of_steps_is_refused(tmp_path, name, found):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} could be of step {found}; rename it to e.g. step_\d+\.\w+, so"):
        scan(tmp_path)


def test_a_folder_that_leaves_a_choice_is_named_and_not_the_file_inside(tmp_path):
    (tmp_path / "resnet18_500").mkdir()
    save_file(tensors(), tmp_path / "resnet18_500" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"resnet18_500 could be of step 18 or 500; rename it to e\.g\. step_500, so"
    ):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["final.pt", "model.safetensors", "last.ckpt", "best/model.safetensors", "step.pt"])
def test_a_name_without_a_step_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    named = tmp_path / name.split("/")[0]
    with pytest.raises(CheckpointError, match=f"{named} has no step in its name; rename it to e.g. step_500"):
        scan(tmp_path)


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


def test_a_lightning_checkpoint_gives_its_state_dict_with_its_own_names(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in tensors().items()}
    rest = {"epoch": 1, "global_step": 7, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}], "loops": {}}
    torch.save({"state_dict": state, **rest}, tmp_path / "epoch=1-step=7.ckpt")
    assert_same(Trajectory.from_directory(tmp_path).load(7).params, state)


def test_a_state_dict_two_levels_down_is_not_searched_for(tmp_path):
    torch.save({"trainer": {"model": tensors()}}, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=r"holds a dict with \['trainer'\], expected a state dict"):
        read_checkpoint(tmp_path / "1.pt", 1)


def test_views_with_other_numbers_at_the_same_place_are_not_mistaken_for_tied_weights(tmp_path):
    base = torch.arange(4.0) + 1
    number, other = torch.tensor([1 + 2j]), torch.tensor([3 + 4j])
    state = {
        "base": base,
        "square": base.view(2, 2),
        "transposed": base.view(2, 2).T,
        "first": base[:1].expand(4),
        "one": base[:1],
        "number": number,
        "conjugate": number.conj(),
        "imaginary": other.imag,
        "negated": other.conj().imag,
    }
    torch.save(state, tmp_path / "1.pt")
    assert_same(read_checkpoint(tmp_path / "1.pt", 1).params, state)


def test_tied_weights_saved_by_safetensors_keep_the_name_the_file_has(tmp_path):
    model = Tied()
    save_model(model, str(tmp_path / "step1.safetensors"))
    params = read_checkpoint(tmp_path / "step1.safetensors", 1).params
    assert len({"embed.weight", "head.weight"} & set(params)) == 1


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_copies_of_tied_weights_are_all_passed_on(tmp_path, save):
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items() if tensor.numel()}
    save(state, tmp_path / "1.safetensors" if save is save_file else tmp_path / "1.pt")
    assert_same(Trajectory.from_directory(tmp_path).load(1).params, state)


def test_a_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint("~/run", Checkpoint(1, tensors()))
    assert Trajectory.from_directory("~/run").steps == (1,)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


@pytest.mark.parametrize(
    ("stem", "suffix", "save"), [("model", "safetensors", save_file), ("pytorch_model", "bin", torch.save)]
)
def test_weights_in_parts_are_those_of_one_file(tmp_path, stem, suffix, save):
    folder = in_parts(tmp_path / "checkpoint-500", stem, suffix, save)
    run = Trajectory.from_directory(tmp_path)
    assert run.steps == (500,)
    assert_same(run.load(500).params, tensors())
    (folder / f"{stem}-2.{suffix}").unlink()
    with pytest.raises(CheckpointError, match=rf"{stem}-2.{suffix}, is it damaged"):
        run.load(500)


def in_parts(folder, stem="model", suffix="safetensors", save=save_file):
    folder.mkdir()
    files = {}
    for number, (name, tensor) in enumerate(tensors().items()):
        files[name] = f"{stem}-{number}.{suffix}"
        save({name: tensor}, folder / files[name])
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"layer.weight": "model-1.safetensors"}, "model-1.safetensors holds 'layer.weight', but it does not"),
        ({"layer.weight": "../model-0.safetensors"}, "must name files of weights"),
        ({"layer.weight": "optimizer.pt"}, "must name files of weights"),
        ({}, "must name files of weights"),
        (None, "as an index of weights"),
    ],
)
def test_an_index_that_is_not_true_is_refused(tmp_path, files, said):
    folder = in_parts(tmp_path / "step5")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match=said):
        Trajectory.from_directory(tmp_path).load(5)


def test_a_part_of_a_checkpoint_is_no_checkpoint(tmp_path):
    save_file(tensors(), tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="is one part of a checkpoint; put all parts and their index"):
        scan(tmp_path)
