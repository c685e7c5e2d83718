"""Folders that a real Trainer saves, against what the recorder wrote at the same steps of the same run."""

import importlib
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_huggingface import assert_same, tiny_gpt2, tiny_neox, train

from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup
from stagewise.checkpoints import CheckpointError, Trajectory, read_checkpoint, write_checkpoint
from stagewise.checkpoints.trainer import logged_rates
from stagewise.fitting import fitted
from stagewise.functional import PureModel
from stagewise.numbered import place, with_names

transformers = pytest.importorskip("transformers")
huggingface = importlib.import_module("stagewise.checkpoints.huggingface")


def saved(tmp_path, make=tiny_gpt2, prepare=None, **settings):
    """Folders of a Trainer after 2 and 4 updates, and what the recorder wrote."""
    model = make()
    if prepare:
        prepare(model)
    recorder = huggingface.RecorderCallback(tmp_path / "recorded", steps=[2, 4])
    settings = {"max_steps": 4, "num_train_epochs": 9} | settings
    train(tmp_path, model, [recorder], save_strategy="steps", save_steps=2, **settings)
    return tmp_path / "trainer", Trajectory.from_directory(tmp_path / "recorded")


def known(make, checkpoint, prepare=None):
    model = make()
    if prepare:
        prepare(model)
    return fitted(PureModel(model), checkpoint)


def assert_known_as_recorded(got, want):
    # Batches and the layers in train mode are the recorder's alone.
    for part in ("params", "first_moment", "second_moment"):
        assert_same(getattr(got, part), getattr(want, part))
    assert got.update_counts == want.update_counts
    assert got.optimizer == want.optimizer
    assert got.digest == want.digest


def freeze_embeddings(model):
    model.get_input_embeddings().weight.requires_grad_(False)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_neox])
@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1},
        {},
        {"max_grad_norm": 0.3, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "gradient_accumulation_steps": 1},
        {"max_grad_norm": 0, "optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1},
    ],
)
def test_a_trainers_folder_is_what_the_recorder_wrote(tmp_path, make, settings):
    folder, recorded = saved(tmp_path, make, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Trajectory.from_directory(folder)
        assert run.steps == (2, 4)
        assert_known_as_recorded(known(make, run.load(2)), known(make, recorded.load(2)))
    # At the end of its schedule the recorder has the last rate, the Trainer's file the next one, 0.
    end, want = known(make, run.load(4)), known(make, recorded.load(4))
    assert end.optimizer.learning_rate == 0
    assert_same(end.second_moment, want.second_moment)
    assert want.optimizer.name == "sgd" or set(end.second_moment) == set(dict(make().named_parameters()))


def test_frozen_parameters_are_left_out_as_they_were_in_training(tmp_path):
    folder, recorded = saved(tmp_path, tiny_neox, freeze_embeddings, weight_decay=0.1)
    got, want = (
        known(tiny_neox, run.load(2), freeze_embeddings) for run in (Trajectory.from_directory(folder), recorded)
    )
    assert_known_as_recorded(got, want)
    assert "gpt_neox.embed_in.weight" not in got.optimizer.updated
    with pytest.warns(UserWarning, match="are not those of this model's parameters .* freeze .* used without its opt"):
        assert known(tiny_neox, Trajectory.from_directory(folder).load(2)).optimizer is None


def test_a_parameter_without_a_gradient_is_not_taken_for_its_neighbour(tmp_path):
    class WithUnused(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.unused = torch.nn.Linear(8, 8)

    def make():
        return WithUnused(tiny_gpt2().config)

    torch.manual_seed(0)
    folder, recorded = saved(tmp_path, make, weight_decay=0.1)
    assert_known_as_recorded(known(make, Trajectory.from_directory(folder).load(2)), known(make, recorded.load(2)))
    assert known(make, Trajectory.from_directory(folder).load(2)).update_counts["unused.weight"] == 0


@pytest.mark.parametrize("given", [None, 0.5, 0])
def test_without_arguments_the_norm_of_clipping_must_be_given(tmp_path, given):
    folder, _ = saved(tmp_path)
    (folder / "checkpoint-2" / "training_args.bin").unlink()
    run = Trajectory.from_directory(folder, clip_norm=given)
    if given is None:
        with pytest.warns(UserWarning, match="does not say whether gradients were clipped; pass their norm"):
            assert run.load(2).optimizer is None
    else:
        assert run.load(2).optimizer.clip_norm == (given or None)
        assert run.load(2).optimizer.batch_size is None
    with pytest.raises(ValueError, match="clip_norm must be positive"):
        Trajectory.from_directory(folder, clip_norm=-1)


def test_what_is_given_goes_before_what_the_folder_says(tmp_path):
    folder, _ = saved(tmp_path)
    assert Trajectory.from_directory(folder).load(2).optimizer.clip_norm == 1.0
    assert Trajectory.from_directory(folder, clip_norm=0.25).load(2).optimizer.clip_norm == 0.25


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_pickle_that_would_run_code_is_refused_and_weights_are_read(tmp_path, capsys):
    folder, recorded = saved(tmp_path)
    torch.save({"param_groups": [], "state": Evil()}, folder / "checkpoint-2" / "optimizer.pt")
    torch.save(Evil(), folder / "checkpoint-2" / "training_args.bin")
    with pytest.warns(UserWarning, match=r"optimizer.pt was refused: it asks for .*print.* used without its optimizer"):
        checkpoint = Trajectory.from_directory(folder).load(2)
    assert checkpoint.optimizer is None
    assert_same(known(tiny_gpt2, checkpoint).params, known(tiny_gpt2, recorded.load(2)).params)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: content | {"param_groups": [g | {"amsgrad": True} for g in content["param_groups"]]},
            "amsgrad=True",
        ),
        (lambda content: content | {"param_groups": [g | {"rho": 1} for g in content["param_groups"]]}, "it has rho"),
        (lambda content: {"state": content["state"]}, "does not hold the state of a torch optimizer"),
        (lambda content: content | {"state": {999: content["state"][0]}}, "in none of its groups"),
        (lambda content: content | {"state": {0: content["state"][0] | {"exp_avg": torch.tensor([torch.nan])}}}, "NaN"),
        (
            lambda content: content | {"state": {0: {"exp_avg": torch.zeros(1)}}},
            "lacks one of exp_avg, exp_avg_sq, step of",
        ),
        (
            lambda content: (
                content | {"param_groups": [{k: v for k, v in g.items() if k != "lr"} for g in content["param_groups"]]}
            ),
            "is none of torch's",
        ),
        (lambda _: [1, 2], "does not hold the state of a torch optimizer"),
    ],
)
def test_an_optimizer_without_words_is_said_and_left_out(tmp_path, change, said):
    folder, _ = saved(tmp_path)
    file = folder / "checkpoint-2" / "optimizer.pt"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.warns(UserWarning, match=said):
        assert Trajectory.from_directory(folder).load(2).optimizer is None


def test_adafactor_is_said_to_be_none_of_ours(tmp_path):
    with pytest.warns(UserWarning, match="Adafactor"):
        folder, _ = saved(tmp_path, optim="adafactor")
    with pytest.warns(UserWarning, match="is none of torch's SGD, Adam and AdamW"):
        assert Trajectory.from_directory(folder).load(2).optimizer is None


def test_a_folder_that_was_renamed_to_another_step_is_refused(tmp_path):
    folder, _ = saved(tmp_path)
    (folder / "checkpoint-2").rename(folder / "checkpoint-3")
    with pytest.raises(CheckpointError, match="is called after step 3, but its trainer_state.json says 2"):
        Trajectory.from_directory(folder).load(3)


def test_a_folder_of_accelerate_is_read_once_clipping_is_known(tmp_path):
    import accelerate

    accelerator, model = accelerate.Accelerator(cpu=True), tiny_neox()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.arange(8)[None] % 13
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(tokens, labels=tokens).loss)
        optimizer.step()
    accelerator.save_state(str(tmp_path / "step_3"))
    checkpoint = known(tiny_neox, Trajectory.from_directory(tmp_path, clip_norm=0).load(3))
    assert checkpoint.optimizer == Optimizer("adam", 0.01, weight_decay=0.1, decoupled=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.second_moment[name], optimizer.state[parameter]["exp_avg_sq"]), name


class Alike(torch.nn.Module):
    """Two vectors of one shape: by rules in use, one is spared decay, the other or both."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(3))
        self.bias = torch.nn.Parameter(torch.zeros(3))


def test_two_rules_that_fit_and_differ_are_a_doubt_and_no_guess():
    groups = (ParameterGroup((place(0, 0),), 0.1, 0.1), ParameterGroup((place(1, 1),), 0.1, 0.0))
    moments = {place(0, 0): torch.zeros(3), place(1, 1): torch.ones(3)}
    numbered = Checkpoint(5, Alike().state_dict(), Optimizer("adam", 0.1, groups=groups), moments, moments)
    with pytest.warns(UserWarning, match="whose names could be different ones"):
        assert with_names(Alike(), numbered).second_moment == {}


def test_a_file_of_another_order_is_not_believed():
    model = torch.nn.Linear(3, 2)
    groups = (ParameterGroup((place(0, 0), place(0, 1)), 0.1),)
    moments = {place(0, 0): torch.zeros(2), place(0, 1): torch.zeros(2, 3)}
    numbered = Checkpoint(5, model.state_dict(), Optimizer("adam", 0.1, groups=groups), moments, moments)
    with pytest.warns(UserWarning, match="2 parameters by number, whose names are not those of this model"):
        assert with_names(model, numbered).optimizer is None


def test_names_in_the_file_are_used(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(reversed(list(model.named_parameters())), lr=0.1, weight_decay=0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    (tmp_path / "step_1").mkdir()
    torch.save(model.state_dict(), tmp_path / "step_1" / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), tmp_path / "step_1" / "optimizer.bin")
    got = fitted(PureModel(model), read_checkpoint(tmp_path / "step_1" / "pytorch_model.bin", 1, clip_norm=0))
    assert {name: tensor.shape for name, tensor in got.second_moment.items()} == {"weight": (2, 3), "bias": (2,)}
    assert got.optimizer.updated == {"weight", "bias"}


def test_the_model_a_trainer_saves_when_done_is_no_checkpoint_of_unknown_step(tmp_path):
    folder, _ = saved(tmp_path)
    tiny_gpt2().save_pretrained(folder)
    torch.save({}, folder / "training_args.bin")
    assert Trajectory.from_directory(folder).steps == (2, 4)


def change_file(folder, change):
    file = folder / "checkpoint-2" / "optimizer.pt"
    torch.save(change(torch.load(file, weights_only=True)), file)


def test_files_of_an_older_torch_have_the_decay_of_the_trainers_adamw(tmp_path):
    folder, recorded = saved(tmp_path, weight_decay=0.1)
    newer = ("decoupled_weight_decay", "fused")

    def older(content):
        groups = [{key: value for key, value in g.items() if key not in newer} for g in content["param_groups"]]
        return content | {"param_groups": groups}

    change_file(folder, older)
    assert_known_as_recorded(
        known(tiny_gpt2, Trajectory.from_directory(folder).load(2)), known(tiny_gpt2, recorded.load(2))
    )
    (folder / "checkpoint-2" / "trainer_state.json").unlink()  # then whose decay it is, nobody says
    with pytest.warns(UserWarning, match="does not say whether it is of Adam or AdamW"):
        assert Trajectory.from_directory(folder).load(2).optimizer is None


@pytest.mark.parametrize("kind", ["NAdam", "RAdam", "Adamax", "RMSprop", "ASGD"])
def test_relatives_of_adam_and_sgd_are_not_taken_for_them(tmp_path, kind):
    folder, _ = saved(tmp_path)
    model = tiny_gpt2()
    optimizer = getattr(torch.optim, kind)(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    change_file(folder, lambda _: optimizer.state_dict())
    with pytest.warns(UserWarning, match="is none of torch's SGD, Adam and AdamW"):
        assert Trajectory.from_directory(folder).load(2).optimizer is None


def test_weights_in_parts_have_their_optimizer_too_and_travel_to_workers(tmp_path):
    folder, recorded = saved(tmp_path)
    here = folder / "checkpoint-2"
    weights = load_file(here / "model.safetensors")
    (here / "model.safetensors").unlink()
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(weights)}
    for name, file in files.items():
        save_file({name: weights[name]}, here / file)
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    run = pickle.loads(pickle.dumps(Trajectory.from_directory(folder)))
    assert_known_as_recorded(known(tiny_gpt2, run.load(2)), known(tiny_gpt2, recorded.load(2)))


def test_a_recorded_copy_of_a_folder_keeps_its_numbers_until_a_model_names_them(tmp_path):
    folder, recorded = saved(tmp_path, weight_decay=0.1)
    write_checkpoint(tmp_path / "copy", Trajectory.from_directory(folder).load(2))
    copied = Trajectory.from_directory(tmp_path / "copy").load(2)
    assert_known_as_recorded(known(tiny_gpt2, copied), known(tiny_gpt2, recorded.load(2)))


LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


@pytest.mark.parametrize("settings", [{}, {"lr_scheduler_type": "constant"}, {"warmup_steps": 3}])
def test_rates_of_coming_updates_are_known_where_each_was_logged(tmp_path, settings):
    folder, recorded = saved(tmp_path, **LOGGED, **settings)
    run = Trajectory.from_directory(folder)
    assert run.load(2).coming_rates == recorded.load(2).coming_rates
    assert run.load(4).learning_rates[-2:] == recorded.load(4).learning_rates[-2:]
    assert len(run.load(2).coming_rates) == (0 if settings.get("lr_scheduler_type") else 2)


def test_rates_that_were_not_all_logged_are_not_known(tmp_path):
    folder, _ = saved(tmp_path, logging_strategy="steps", logging_steps=2)
    assert Trajectory.from_directory(folder).load(2).coming_rates == ()


def state_of_rates(folder, logged, following):
    folder.mkdir()
    history = [{"step": step, "learning_rate": rate, "loss": 1.0} for step, rate in logged.items()]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": max(logged), "log_history": history}))
    torch.save({"_last_lr": [following, following]}, folder / "scheduler.pt")
    return folder


@pytest.mark.parametrize(
    ("logged", "following", "certain"),
    [
        ({1: 4.0, 2: 3.0, 3: 2.0}, 1.0, (4.0, 3.0, 2.0)),  # of the update just made
        ({1: 3.0, 2: 2.0, 3: 1.0}, 1.0, ()),  # of the next one, or a schedule that has come to rest
        ({1: 3.0, 2: 1.0, 3: 1.0}, 1.0, (1.0,)),
        ({1: 1.0, 2: 1.0, 3: 1.0}, 1.0, (1.0, 1.0)),
        ({1: 4.0, 3: 2.0}, 1.0, (2.0,)),
    ],
)
def test_of_logged_rates_those_are_believed_that_do_not_hang_on_the_version(tmp_path, logged, following, certain):
    assert logged_rates(state_of_rates(tmp_path / "checkpoint-3", logged, following)) == certain


def test_names_in_the_place_of_numbers_are_names(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names, content = ["weight", "bias"], optimizer.state_dict()
    content["state"] = {names[number]: kept for number, kept in content["state"].items()}
    content["param_groups"][0]["params"] = names
    (tmp_path / "step_1").mkdir()
    torch.save(model.state_dict(), tmp_path / "step_1" / "pytorch_model.bin")
    torch.save(content, tmp_path / "step_1" / "optimizer.bin")
    got = fitted(PureModel(model), Trajectory.from_directory(tmp_path, clip_norm=0).load(1))
    assert torch.equal(got.second_moment["bias"], optimizer.state[model.bias]["exp_avg_sq"])
