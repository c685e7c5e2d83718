"""Of files that allow it, the rows that are wanted are read and no others: together they are the whole tensors."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from problem import checkpoint, made
from safetensors.torch import save_file

import stagewise as sw
from stagewise.checkpoints import weights
from stagewise.fitting import fitted
from stagewise.in_place import InPlaceModel
from stagewise.piece import Piece


def ours(folder):
    sw.write_checkpoint(folder, checkpoint())
    return sw.Trajectory.from_directory(folder)


def of_files(folder):
    """As Hugging Face saves large models."""
    place, tensors = folder / "step_3", {name: t.contiguous() for name, t in made().state_dict().items()}
    place.mkdir(parents=True)
    halves = {"model-1.safetensors": [*tensors][:6], "model-2.safetensors": [*tensors][6:]}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, place / file)
    where = {name: file for file, names in halves.items() for name in names}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sw.Trajectory.from_directory(folder)


def of_one_process(folder):
    """Whole tensors as ``torch.distributed.checkpoint`` saves them without a process group."""
    dcp.save({"model": made().state_dict()}, checkpoint_id=folder / "step_3", no_dist=True)
    return sw.Trajectory.from_directory(folder)


def held_by(index, count):
    """The model as one of several processes holds it."""
    model = InPlaceModel(made())
    model.pieces = {name: Piece.held(piece.shape, index, count) for name, piece in model.pieces.items()}
    return model


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("saved", [ours, of_files, of_one_process])
def test_the_rows_of_all_processes_are_the_whole_checkpoint(saved, count, tmp_path, monkeypatch):
    trajectory, read = saved(tmp_path / "run"), []
    whole, one = trajectory.load(3), weights._read_tensor

    def spied(*asked):
        read.append(one(*asked))
        return read[-1]

    monkeypatch.setattr(weights, "_read_tensor", spied)
    parts = []
    for index in range(count):
        model = held_by(index, count)
        with model.reading_rows() as wanted:
            parts.append(trajectory.load_rows(3, wanted))
        assert all(parts[-1].params[name].shape == piece.own for name, piece in model.pieces.items())
        read_here, read[:] = {tensor.numel() for tensor in read}, []
        assert saved is of_one_process or max(read_here) <= 6 * -(-11 // count)  # no embedding in one piece
    for kind in ("params", "first_moment", "second_moment"):
        for name, tensor in getattr(whole, kind).items():
            together = [getattr(part, kind)[name] for part in parts]
            assert torch.equal(tensor, together[0] if name == "scale" else torch.cat(together))


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path):
    other = checkpoint()
    other = other.holding(params=dict(other.params) | {"head.weight": torch.zeros(7, 6)})
    with pytest.raises(
        sw.checkpoint.CheckpointError, match=r"'head.weight' has shape \(7, 6\), the model expects \(5, 6\)"
    ):
        fitted(held_by(1, 2), other)


def of_torch(folder, tensors):
    """Files that are read whole."""
    (folder / "step_3").mkdir(parents=True)
    torch.save(tensors, folder / "step_3" / "pytorch_model.bin")
    return sw.Trajectory.from_directory(folder)


def of_safetensors(folder, tensors):
    (folder / "step_3").mkdir(parents=True)
    save_file(tensors, folder / "step_3" / "model.safetensors")
    return sw.Trajectory.from_directory(folder)


def in_memory(folder, tensors):
    return sw.Trajectory.from_checkpoints([sw.Checkpoint(3, tensors)])


@pytest.mark.parametrize("saved", [of_torch, of_safetensors, in_memory])
def test_a_checkpoint_with_as_many_rows_as_are_here_is_not_taken_for_these_rows(saved, tmp_path):
    smaller = dict(made().state_dict())
    smaller["embed.weight"] = smaller["embed.weight"][:6].clone()
    trajectory, model = saved(tmp_path / "run", smaller), held_by(0, 2)
    assert model.pieces["embed.weight"].own == (6, 6)
    refused = pytest.raises(sw.checkpoint.CheckpointError, match=r"has shape \(6, 6\), the model expects \(11, 6\)")
    with refused, model.reading_rows() as wanted:
        fitted(model, trajectory.load_rows(3, wanted) if trajectory.load_rows else trajectory.load(3))
