"""Folders that torch.distributed.checkpoint saves, alone and as a Trainer has them, against a snapshot in memory."""

import json
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_runs import assert_same, batches, net, update
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import stagewise as sw
from stagewise.checkpoints import CheckpointError, Trajectory
from stagewise.fitting import fitted
from stagewise.functional import PureModel

CLIP = 0.5


class Cut(DefaultSavePlanner):
    """Saves every tensor in two parts by rows, as two processes would: unequal ones, and none of what has one row."""

    def create_local_plan(self):
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self.parts(item)])
        return self.plan

    def parts(self, item):
        data = item.tensor_data
        if data is None or not data.size:
            return [item]
        rows, rest = data.size[0], data.size[1:]
        cuts = ((0, (rows + 1) // 2), ((rows + 1) // 2, rows))
        return [
            replace(
                item,
                index=MetadataIndex(item.index.fqn, (start, *(0 for _ in rest))),
                type=WriteItemType.SHARD,
                tensor_data=replace(
                    data,
                    chunk=ChunkStorageMetadata(
                        torch.Size((start, *(0 for _ in rest))), torch.Size((stop - start, *rest))
                    ),
                ),
            )
            for start, stop in cuts
        ]

    def resolve_data(self, item):
        if item.type != WriteItemType.SHARD:
            return super().resolve_data(item)
        chunk = item.tensor_data.chunk
        return self.state_dict[item.index.fqn].detach()[chunk.offsets[0] :][: chunk.sizes[0]].clone()


def save(content, folder, cut=True):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # that there is no process group
        dcp.save(
            content,
            storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False),
            planner=Cut() if cut else None,
            no_dist=True,
        )


def adamw(model):
    weights = [p for name, p in model.named_parameters() if "bias" not in name]
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)


def trained(make=adamw, steps=3):
    model = net()
    optimizer = make(model)
    for batch in batches(steps):
        update(model, optimizer, batch, CLIP)
    return model, optimizer


def states(model, optimizer, flat=False):
    return get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))


def nested(model, optimizer):
    weights, memory = states(model, optimizer)
    return {"model": weights, "optimizer": memory}


def of_the_tutorial(model, optimizer):
    weights, memory = states(model, optimizer)
    return {"app": {"model": weights, "optim": memory}}


def flat(model, optimizer):
    weights, memory = states(model, optimizer, flat=True)
    return weights | {"optimizer": memory, "train_state": {"step": torch.tensor(3)}}


def by_number(model, optimizer):
    return {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}


def assert_known(got, model, optimizer):
    want = sw.snapshot(got.step, model, optimizer, clip_norm=CLIP)
    got = fitted(PureModel(net()), got)
    for part in ("params", "first_moment", "second_moment"):
        assert_same(getattr(got, part), getattr(want, part))
    assert (got.update_counts, got.optimizer) == (want.update_counts, want.optimizer)
    assert got.digest == want.digest


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("layout", [nested, of_the_tutorial, flat, by_number])
def test_a_sharded_folder_is_the_model_and_the_optimizer_that_were_saved(tmp_path, layout, cut):
    model, optimizer = trained()
    save(layout(model, optimizer), tmp_path / "step_3", cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Trajectory.from_directory(tmp_path, clip_norm=CLIP)
        assert run.steps == (3,)
        assert_known(pickle.loads(pickle.dumps(run)).load(3), model, optimizer)


def test_momentum_is_read_too(tmp_path):
    model, optimizer = trained(
        lambda model: torch.optim.SGD(
            [{"params": [p], "lr": 0.1 * (p.dim() + 1)} for p in model.parameters()], momentum=0.9
        )
    )
    save(nested(model, optimizer), tmp_path / "step_3")
    assert_known(Trajectory.from_directory(tmp_path, clip_norm=CLIP).load(3), model, optimizer)


def test_weights_alone_have_no_optimizer_and_no_warning(tmp_path):
    model, _ = trained()
    save({"model": model.state_dict()}, tmp_path / "step_3")
    save(model.state_dict(), tmp_path / "step_4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (3, 4):
            checkpoint = Trajectory.from_directory(tmp_path).load(step)
            assert checkpoint.optimizer is None
            assert_same(checkpoint.params, model.state_dict())


def test_half_precision_is_lifted(tmp_path):
    weights = {"w": torch.arange(6).reshape(3, 2).bfloat16()}
    save(weights, tmp_path / "step_1")
    assert_same(Trajectory.from_directory(tmp_path).load(1).params, {"w": weights["w"].float()})


def trainer_folder(folder, model, optimizer):
    """As transformers and accelerate leave it: with shards they write no training_args.bin."""
    weights, memory = states(model, optimizer)
    save({"model": weights}, folder / "pytorch_model_fsdp_0")
    save({"optimizer": memory}, folder / "optimizer_0")
    history = [{"step": step, "learning_rate": rate} for step, rate in ((2, 0.04), (3, 0.03))]
    state = {"global_step": 3, "train_batch_size": 4, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    torch.save({"_last_lr": [0.02, 0.02]}, folder / "scheduler.pt")
    for rank in range(2):
        torch.save({}, folder / f"rng_state_{rank}.pth")
    return folder


def test_a_trainers_sharded_folder_is_read_once_clipping_is_known(tmp_path):
    model, optimizer = trained()
    folder = trainer_folder(tmp_path / "checkpoint-3", model, optimizer)
    checkpoint = Trajectory.from_directory(tmp_path, clip_norm=CLIP).load(3)
    assert checkpoint.learning_rates == (0.04, 0.03)
    assert_known(checkpoint, model, optimizer)
    with pytest.warns(UserWarning, match="checkpoint-3 does not say whether gradients were clipped; pass their norm"):
        assert Trajectory.from_directory(tmp_path).load(3).optimizer is None
    torch.save(SimpleNamespace(max_grad_norm=CLIP, gradient_accumulation_steps=2), folder / "training_args.bin")
    assert Trajectory.from_directory(tmp_path).load(3).optimizer.batch_size == 4 * 2 * 2


def test_shards_of_the_optimizer_are_read_beside_whole_weights(tmp_path):
    model, optimizer = trained()
    folder = trainer_folder(tmp_path / "checkpoint-3", model, optimizer)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "pytorch_model_fsdp_0" / ".metadata").unlink()
    assert_known(Trajectory.from_directory(tmp_path, clip_norm=CLIP).load(3), model, optimizer)


def test_of_several_optimizers_none_is_chosen(tmp_path):
    model, optimizer = trained()
    save(
        {"optimizer": states(model, optimizer)[1]},
        trainer_folder(tmp_path / "step_3", model, optimizer) / "optimizer_1",
    )
    save(nested(model, optimizer) | {"other": states(model, optimizer)[1]}, tmp_path / "step_4")
    run = Trajectory.from_directory(tmp_path, clip_norm=CLIP)
    for step, said in ((3, "has optimizer_1 beside optimizer_0"), (4, "holds 2 optimizers")):
        with pytest.warns(UserWarning, match=said):
            assert run.load(step).optimizer is None


def test_an_optimizer_without_its_parameters_is_said_and_left_out(tmp_path):
    model, optimizer = trained()
    content = nested(model, optimizer)
    del content["optimizer"]["param_groups"][1]["params"]
    save(content, tmp_path / "step_3")
    with pytest.warns(UserWarning, match="does not hold the state of a torch optimizer: KeyError.* used without its"):
        assert Trajectory.from_directory(tmp_path, clip_norm=CLIP).load(3).optimizer is None


class Evil:
    def __init__(self, call=print, *arguments):
        self.reduced = call, arguments or ("code was run",)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("evil", "asked"),
    [
        (Evil(), "builtins.print"),
        (Evil(getattr, "text", "upper"), "builtins.getattr"),
        (Evil(torch.load, "file"), "torch.serialization.load"),
        (Evil(dcp.FileSystemReader, "folder"), "torch.distributed.checkpoint.filesystem.FileSystemReader"),
        (Evil(nn.Linear, 2, 3), "torch.nn.modules.linear.Linear"),
    ],
)
def test_metadata_that_would_run_code_is_refused_and_nothing_is_run(tmp_path, capsys, evil, asked):
    model, optimizer = trained()
    save(nested(model, optimizer), tmp_path / "step_3")
    file = tmp_path / "step_3" / ".metadata"
    content = pickle.loads(file.read_bytes())
    content.planner_data["model.body.weight"] = evil
    for pickled in (pickle.dumps(evil), pickle.dumps(content)):
        file.write_bytes(pickled)
        with pytest.raises(CheckpointError, match=rf"\.metadata was refused: it asks for {asked}; only the records"):
            Trajectory.from_directory(tmp_path).load(3)
    assert "code was run" not in capsys.readouterr().out


def test_values_that_would_run_code_are_refused_and_weights_are_read(tmp_path, capsys):
    model, optimizer = trained()
    content = nested(model, optimizer)
    content["optimizer"]["param_groups"][0]["lr"] = Evil()
    save(content, tmp_path / "step_3")
    with pytest.warns(UserWarning, match=r"distcp was refused: it asks for .*print.* used without its optimizer"):
        checkpoint = Trajectory.from_directory(tmp_path, clip_norm=0).load(3)
    assert checkpoint.optimizer is None
    assert_same(checkpoint.params, model.state_dict())
    assert "code was run" not in capsys.readouterr().out


def change_metadata(folder, change):
    file = folder / ".metadata"
    content = pickle.loads(file.read_bytes())
    change(content)
    file.write_bytes(pickle.dumps(content))


def stored(content, key):
    return next(info for index, info in content.storage_data.items() if index.fqn == key)


def parts(content, key="body.weight"):
    return content.state_dict_metadata[key].chunks


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: vars(stored(content, "body.weight")).update(relative_path="../x"),
            "stand beside it, but names",
        ),
        (lambda content: vars(stored(content, "body.weight")).update(relative_path=".."), "cannot read"),
        (
            lambda content: vars(stored(content, "body.weight")).update(relative_path="gone.distcp"),
            r"gone\.distcp, which",
        ),
        (lambda content: vars(stored(content, "body.weight")).update(length=10**9), "the file is cut off"),
        (lambda content: vars(stored(content, "body.weight")).update(offset=-1), "has a negative number"),
        (
            lambda content: vars(stored(content, "body.weight")).update(transform_descriptors=["stream.zstd"]),
            r"compressed .*stream\.zstd.* save it without",
        ),
        (lambda content: parts(content).pop(), "the parts of 'body.weight' leave gaps in it, or overlap"),
        (lambda content: parts(content).append(parts(content)[0]), "leave gaps in it, or overlap"),
        (lambda content: parts(content).__setitem__(1, parts(content)[0]), "leave gaps in it, or overlap"),
        (lambda content: vars(parts(content)[1]).update(sizes=torch.Size((9, 5))), r"is not within \(8, 5\)"),
        (lambda content: vars(parts(content)[1]).update(sizes=torch.Size((4,))), "is not the metadata of"),
        (lambda content: content.storage_data.clear(), "does not say where"),
        (lambda content: vars(content).pop("storage_data"), "is not the metadata of torch.distributed.checkpoint"),
        (
            lambda content: vars(content).update(storage_data=None),
            "is not the metadata of torch.distributed.checkpoint",
        ),
        (
            lambda content: vars(stored(content, "body.weight")).update(vars(stored(content, "head.weight"))),
            r"is not the tensor of shape \(4, 5\) that it says; is one of the files of another",
        ),
    ],
)
def test_metadata_that_is_not_true_is_an_error_and_no_weights(tmp_path, change, said):
    save(trained()[0].state_dict(), tmp_path / "step_3")
    change_metadata(tmp_path / "step_3", change)
    with pytest.raises(CheckpointError, match=said):
        Trajectory.from_directory(tmp_path).load(3)


def test_a_missing_shard_is_named_and_other_steps_are_read(tmp_path):
    model, _ = trained()
    for step in (3, 4):
        save(model.state_dict(), tmp_path / f"step_{step}")
    gone = sorted((tmp_path / "step_3").glob("*.distcp"))[1]
    gone.unlink()
    run = Trajectory.from_directory(tmp_path)
    assert_same(run.load(4).params, model.state_dict())
    with pytest.raises(CheckpointError, match=rf"cannot read .*{gone.name}, which .metadata names: No such file"):
        run.load(3)


@pytest.mark.parametrize("kept", [0, 40])
def test_damaged_metadata_is_said_to_be(tmp_path, kept):
    save(trained()[0].state_dict(), tmp_path / "step_3")
    file = tmp_path / "step_3" / ".metadata"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cannot read .*\.metadata, is it damaged or cut off"):
        Trajectory.from_directory(tmp_path).load(3)
    file.unlink()
    with pytest.raises(CheckpointError, match="nor the .metadata of shards, which is written last"):
        Trajectory.from_directory(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    save({"w": torch.tensor([1.0, torch.nan])}, tmp_path / "step_3")
    with pytest.raises(CheckpointError, match="'w' has 1 values that are NaN or infinite"):
        Trajectory.from_directory(tmp_path).load(3)


def test_another_model_is_refused(tmp_path):
    model, optimizer = trained()
    save(nested(model, optimizer), tmp_path / "step_3")
    checkpoint = Trajectory.from_directory(tmp_path, clip_norm=CLIP).load(3)
    for other, said in (
        (nn.Linear(5, 3), "is it of another model"),
        (nn.Sequential(net(), nn.Linear(3, 3)), "another"),
    ):
        with pytest.raises(CheckpointError, match=said):
            fitted(PureModel(other.double()), checkpoint)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": {"w": torch.ones(2)}, "epoch": 3}, r"holds \['epoch', 'weights'\], expected a state dict"),
        ({"model": {"w": torch.ones(2), "name": "x"}}, "expected a state dict"),
        ({"run": {"model": {"w": torch.ones(2)}}, "mean": {"model": {"w": torch.ones(2)}}}, "holds 2 models"),
    ],
)
def test_what_is_no_model_or_several_is_not_guessed(tmp_path, content, said):
    save(content, tmp_path / "step_3")
    with pytest.raises(CheckpointError, match=said):
        Trajectory.from_directory(tmp_path).load(3)


def test_the_folder_of_one_checkpoint_is_not_taken_for_a_run(tmp_path):
    model, optimizer = trained()
    save(nested(model, optimizer), tmp_path / "step_3")
    trainer_folder(tmp_path / "checkpoint-4", model, optimizer)
    for name in ("step_3", "checkpoint-4"):
        with pytest.raises(CheckpointError, match="is one checkpoint of sharded training; pass the folder that holds"):
            Trajectory.from_directory(tmp_path / name)


def test_the_shards_that_are_saved_when_training_is_done_are_no_checkpoint_of_step_0(tmp_path):
    model, optimizer = trained()
    trainer_folder(tmp_path / "checkpoint-3", model, optimizer)
    trainer_folder(tmp_path, model, optimizer)
    assert Trajectory.from_directory(tmp_path).steps == (3,)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_window_influence_is_bit_for_bit_that_of_a_plain_checkpoint(tmp_path):
    model, optimizer = trained()
    save(nested(model, optimizer), tmp_path / "sharded" / "step_3")
    sw.write_checkpoint(tmp_path / "plain", sw.snapshot(3, model, optimizer, clip_norm=CLIP))
    (inputs, labels), query = batches(2)
    task = sw.Task(net(), loss, train=(inputs, labels), queries={"val": query}, objective="samples")
    found = [
        sw.window_influence(
            task,
            Trajectory.from_directory(tmp_path / name, clip_norm=CLIP),
            window=3,
            per="sample",
            order=sw.BatchOrder(8, 4, seed=1),
        ).value.values
        for name in ("sharded", "plain")
    ]
    assert abs(found[0]).min() > 0
    assert (found[0] == found[1]).all()
