"""Recording from inside a real Trainer, against what a second callback sees."""

import importlib
import sys
import warnings

import pytest
import torch

from stagewise.checkpoints import CheckpointError, Optimizer, Trajectory, check_fits

transformers = pytest.importorskip("transformers")
huggingface = importlib.import_module("stagewise.checkpoints.huggingface")

STEPS = 4


def tiny_gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def tiny_neox():
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=13,
            max_position_embeddings=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


class Witness(transformers.TrainerCallback):
    """Keeps copies of what the Trainer hands around after every update."""

    def __init__(self):
        self.seen = {}

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        self.look(state, kwargs["model"], kwargs["optimizer"])

    on_step_end = on_train_begin

    def look(self, state, model, optimizer):
        params = {n: p.detach().clone() for n, p in model.named_parameters()}
        memory = {n: dict(optimizer.state.get(p, {})) for n, p in model.named_parameters()}
        moments = {key: {n: m[key].clone() for n, m in memory.items() if key in m} for key in ("exp_avg", "exp_avg_sq")}
        self.seen[state.global_step] = (params, moments, optimizer.param_groups[0]["lr"])


def train(tmp_path, model, callbacks, resume_from_checkpoint=None, **settings):
    tokens = torch.randint(13, (64, 8), generator=torch.Generator().manual_seed(1))
    settings = {
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    } | settings
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path / "trainer"), **settings),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same(got, want):
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_neox])
def test_weights_moments_and_rates_are_those_the_trainer_held(tmp_path, make):
    witness, model = Witness(), make()
    recorder = huggingface.RecorderCallback(tmp_path / "run", steps=range(STEPS + 1))
    train(tmp_path, model, [witness, recorder])

    run = Trajectory.from_directory(tmp_path / "run")
    assert run.steps == (0, 1, 2, 3, 4)
    for step in run.steps:
        checkpoint, (params, moments, rate) = run.load(step), witness.seen[step]
        assert_same({n: checkpoint.params[n] for n in params}, params)
        assert_same(checkpoint.first_moment, moments["exp_avg"])
        assert_same(checkpoint.second_moment, moments["exp_avg_sq"])
        if step < STEPS:
            assert checkpoint.optimizer.learning_rate == rate
    assert run.load(0).second_moment == {}
    assert set(run.load(1).second_moment) == {name for name, _ in model.named_parameters()}
    # Linear decay over 4 updates: the next update's rate; at the end, where that is 0, the last one's.
    rates = [run.load(step).optimizer.learning_rate for step in run.steps]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2, 0.25e-2])
    assert run.load(2).optimizer == Optimizer("adam", rates[2], decoupled=True, batch_size=8, clip_norm=1.0)
    assert [len(run.load(step).learning_rates) for step in run.steps] == [0, 1, 1, 1, 1]
    assert sum((run.load(step).learning_rates for step in run.steps), ()) == pytest.approx(
        [1e-2, 0.75e-2, 0.5e-2, 0.25e-2]
    )
    assert run.load(3).update_counts == {}


def test_a_recorded_run_is_the_unrecorded_run(tmp_path):
    recorder = huggingface.RecorderCallback(tmp_path / "run", steps=range(STEPS + 1))
    recorded = train(tmp_path, tiny_gpt2(), [recorder])
    assert_same(recorded, train(tmp_path, tiny_gpt2(), []))


def test_only_the_steps_asked_for_are_kept_with_the_batch_size_given(tmp_path):
    recorder = huggingface.RecorderCallback(tmp_path / "run", steps=[1, 3, 99], batch_size=5)
    with pytest.warns(UserWarning, match="used 8 samples, but batch_size is 5"):
        train(tmp_path, tiny_gpt2(), [recorder])
    run = Trajectory.from_directory(tmp_path / "run")
    assert run.steps == (1, 3)
    assert run.load(3).optimizer.batch_size == 5


def test_checkpoints_fit_a_task_of_the_same_model_with_tied_embeddings(tmp_path):
    from stagewise.task import Task

    train(tmp_path, tiny_gpt2(), [huggingface.RecorderCallback(tmp_path / "run", steps=[2])])
    model = tiny_gpt2().eval()
    tokens = torch.arange(16).reshape(2, 8) % 13
    task = Task(model, lambda m, b: -m(b).logits.float().log_softmax(-1)[..., 0], train=tokens, queries={"q": tokens})
    checkpoint = Trajectory.from_directory(tmp_path / "run").load(2)
    check_fits(task, checkpoint)
    before = task.losses(task.state(), tokens)
    assert not torch.equal(task.losses(checkpoint.params, tokens), before)


@pytest.mark.parametrize(
    ("given", "recorded"), [({}, 1.0), ({"max_grad_norm": 0.3}, 0.3), ({"max_grad_norm": 0}, None)]
)
def test_the_norm_the_trainer_clips_at_is_recorded(tmp_path, given, recorded):
    train(tmp_path, tiny_gpt2(), [huggingface.RecorderCallback(tmp_path / "run", steps=[2])], **given)
    assert Trajectory.from_directory(tmp_path / "run").load(2).optimizer.clip_norm == recorded


def test_a_warm_up_from_0_is_recorded_with_the_rates_of_all_updates(tmp_path):
    recorder = huggingface.RecorderCallback(tmp_path / "run", steps=[0, STEPS])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tmp_path, tiny_gpt2(), [recorder], warmup_steps=2)
    run = Trajectory.from_directory(tmp_path / "run")
    assert run.load(0).optimizer.learning_rate == 0
    assert run.load(STEPS).learning_rates == pytest.approx([0, 0.5e-2, 1e-2, 0.5e-2])


def test_weights_that_are_spared_the_decay_are_named(tmp_path):
    model = tiny_gpt2()
    train(tmp_path, model, [huggingface.RecorderCallback(tmp_path / "run", steps=[1])], weight_decay=0.1)
    rule = Trajectory.from_directory(tmp_path / "run").load(1).optimizer
    assert {group.weight_decay: group.learning_rate for group in rule.groups} == {0.1: 0.75e-2, 0.0: 0.75e-2}
    assert rule.updated == {name for name, _ in model.named_parameters()}
    spared = next(group for group in rule.groups if group.weight_decay == 0)
    assert "transformer.ln_f.weight" in spared.names
    assert rule.weight_decay == 0.1


def test_dropout_of_a_model_that_came_in_eval_mode_is_noticed(tmp_path):
    train(tmp_path, tiny_gpt2().eval(), [huggingface.RecorderCallback(tmp_path / "run", steps=[0, 2])])
    assert "Dropout" in Trajectory.from_directory(tmp_path / "run").load(2).train_mode


def test_a_model_without_dropout_repeats_itself_in_train_mode(tmp_path):
    train(tmp_path, tiny_neox(), [huggingface.RecorderCallback(tmp_path / "run", steps=[2])])
    assert Trajectory.from_directory(tmp_path / "run").load(2).train_mode == ()


def test_a_resumed_run_goes_on_recording_and_counting(tmp_path):
    whole = huggingface.RecorderCallback(tmp_path / "whole", steps=range(STEPS + 1))
    train(tmp_path, tiny_gpt2(), [whole], save_strategy="steps", save_steps=2)
    saved = str(tmp_path / "trainer" / "checkpoint-2")
    resumed = huggingface.RecorderCallback(tmp_path / "resumed", steps=range(STEPS + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tmp_path, tiny_gpt2(), [resumed], resume_from_checkpoint=saved)
    first, second = (Trajectory.from_directory(tmp_path / name) for name in ("whole", "resumed"))
    assert second.steps == (2, 3, 4)
    for step in second.steps:
        assert second.load(step).digest == first.load(step).digest
    assert second.load(2).learning_rates == ()
    assert second.load(3).learning_rates == first.load(3).learning_rates


class Breaks(transformers.TrainerCallback):
    """Takes the folder away when training begins, after the recorder has looked at it."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        self.folder.rmdir()
        self.folder.touch()


def test_a_folder_that_goes_away_before_training_does_not_stop_the_trainer(tmp_path):
    recorder = huggingface.RecorderCallback(tmp_path / "run", steps=[1, 2])
    with pytest.warns(UserWarning, match="nothing will be recorded: cannot make the folder"):
        recorded = train(tmp_path, tiny_neox(), [Breaks(tmp_path / "run"), recorder])
    assert_same(recorded, train(tmp_path, tiny_neox(), []))


def test_an_optimizer_without_words_leaves_weights_alone_and_the_trainer_running(tmp_path):
    recorder = huggingface.RecorderCallback(tmp_path / "run", steps=[1, 2])
    with pytest.warns(UserWarning, match="Adafactor is none of SGD"):
        train(tmp_path, tiny_gpt2(), [recorder], optim="adafactor")
    assert Trajectory.from_directory(tmp_path / "run").load(2).optimizer is None


def test_only_the_first_process_writes(tmp_path):
    recorder = huggingface.RecorderCallback(tmp_path, steps=[0])
    state = transformers.TrainerState(is_world_process_zero=False)
    model = torch.nn.Linear(1, 1)
    recorder.on_train_begin(None, state, None, model=model, optimizer=torch.optim.AdamW(model.parameters()))
    recorder.on_step_end(None, state, None)
    assert list(tmp_path.iterdir()) == []


def test_bad_steps_and_folders_are_refused_before_the_trainer_starts(tmp_path):
    with pytest.raises(ValueError, match="steps is empty"):
        huggingface.RecorderCallback(tmp_path, steps=[])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        huggingface.RecorderCallback(tmp_path / "file" / "run", steps=[0])


@pytest.mark.parametrize("absent", ["transformers", "accelerate"])
def test_without_transformers_the_message_says_what_to_install(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, "stagewise.checkpoints.huggingface")
    with pytest.raises(ImportError, match=r"pip install 'stagewise\[hf\]'"):
        importlib.import_module("stagewise.checkpoints.huggingface")
