"""The samples that a Trainer's updates used, against the rows that came into the model."""

import importlib
import warnings
from collections import Counter
from itertools import chain

import pytest
import torch

from stagewise.checkpoints import Trajectory

transformers = pytest.importorskip("transformers")
huggingface = importlib.import_module("stagewise.checkpoints.huggingface")

ROWS = 11


class Witness(torch.nn.Module):
    """Each row holds its own number, so that the model sees which samples it is trained on."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(self.line.weight)
        torch.nn.init.zeros_(self.line.bias)
        self.rows = []

    def forward(self, x, labels):
        self.rows += x[:, 0].long().tolist()
        return {"loss": (self.line(x) - labels).square().mean()}


class Log(transformers.TrainerCallback):
    """The rows of every update, by the step that it led to."""

    def __init__(self):
        self.updates = {}

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        self.updates[state.global_step], kwargs["model"].rows = kwargs["model"].rows, []


class Loops(transformers.TrainerCallback):
    """Goes through the training data by itself while an epoch is under way."""

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if state.global_step == 2:
            list(kwargs["train_dataloader"])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from rows()


def rows(count=ROWS):
    return [{"x": torch.tensor([float(i)]), "labels": torch.tensor([0.0])} for i in range(count)]


def train(folder, data=None, steps=range(100), resume=None, trainer=transformers.Trainer, also=(), **settings):
    """The rows of every update, the recorded run, and the final weight."""
    settings = {
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    } | settings
    log, model = Log(), Witness()
    arguments = transformers.TrainingArguments(str(folder / "trainer"), **settings)
    recorder = [] if steps is None else [huggingface.RecorderCallback(folder / "run", steps)]
    data = rows() if data is None else data
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(model, arguments, train_dataset=data, callbacks=[log, *recorder, *also]).train(resume)
    weight = model.line.weight.detach().clone()
    return log.updates, Trajectory.from_directory(folder / "run") if recorder else None, weight


def recorded(run):
    """The rows of every update in the files."""
    steps = [
        step for before, step in zip(run.steps, run.steps[1:], strict=False) for step in range(before + 1, step + 1)
    ]
    return dict(zip(steps, [b.tolist() for step in run.steps for b in run.load(step).batches], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_every_update_has_the_rows_that_the_model_saw_over_epochs_that_do_not_divide(tmp_path, parts, workers):
    seen, run, _ = train(tmp_path, gradient_accumulation_steps=parts, dataloader_num_workers=workers)
    assert recorded(run) == seen
    assert set(Counter(row for row in chain.from_iterable(seen.values())).values()) == {2}  # each once in both epochs
    assert len(seen) == 2 * -(-6 // parts)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
        {"max_steps": 5},
        {"accelerator_config": {"dispatch_batches": True}},
        {"data_seed": 3, "accelerator_config": {"use_seedable_sampler": False}},
        {"train_sampling_strategy": "sequential"},
    ],
    ids=str,
)
def test_other_ways_of_the_trainer_to_load_data_are_followed(tmp_path, settings):
    seen, run, _ = train(tmp_path, gradient_accumulation_steps=2, **settings)
    assert recorded(run) == seen


def test_batches_between_chosen_steps_are_those_of_all_updates(tmp_path):
    seen, run, _ = train(tmp_path, steps=[0, 3, 7, 12])
    assert recorded(run) == seen
    assert [len(run.load(step).batches) for step in run.steps] == [0, 3, 4, 5]
    assert [batch.tolist() for batch in run.load(3).coming_batches] == [seen[step] for step in range(4, 13)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_recorded_run_is_the_unrecorded_run(tmp_path, workers):
    first, _, weight = train(tmp_path / "with", dataloader_num_workers=workers)
    state = torch.get_rng_state()
    second, _, same = train(tmp_path / "without", steps=None, dataloader_num_workers=workers)
    assert first == second
    assert torch.equal(weight, same)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("saved", [2, 3, 4])
def test_a_resumed_run_knows_the_rows_after_those_it_skips(tmp_path, saved, skip):
    """Three updates an epoch: resumed within the first, between both, and within the second."""
    settings = {"gradient_accumulation_steps": 2, "ignore_data_skip": not skip}
    whole, _, _ = train(tmp_path / "whole", save_strategy="steps", save_steps=1, **settings)
    start = str(tmp_path / "whole" / "trainer" / f"checkpoint-{saved}")
    seen, run, _ = train(tmp_path / "resumed", resume=start, **settings)
    assert recorded(run) == seen
    assert min(seen) == saved + 1
    if skip:
        assert seen == {step: samples for step, samples in whole.items() if step > saved}


def test_a_second_pass_over_the_training_data_leaves_its_epoch_unknown_and_never_wrong(tmp_path):
    seen, run, _ = train(tmp_path, also=[Loops()])
    known = {step: [batch.tolist() for batch in run.load(step).batches] for step in run.steps}
    assert known == {step: [seen[step]] if step in (1, 2, *range(7, 13)) else [] for step in range(13)}


class OwnLoader(transformers.Trainer):
    """A loader that accelerate has not made."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=2)


@pytest.mark.parametrize("make", [Stream, rows])
def test_without_known_batches_everything_else_is_recorded_and_nothing_said(tmp_path, make):
    trainer = OwnLoader if make is rows else transformers.Trainer
    _, run, _ = train(tmp_path, make(), trainer=trainer, max_steps=3)
    assert [run.load(step).batches for step in run.steps] == [()] * 4
    assert run.load(3).optimizer.batch_size == 2
    assert len(run.load(3).learning_rates) == 1
