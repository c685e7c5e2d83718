"""How a run folder is filled: in one process or several, whole or continued, with or without usable checkpoints."""

import gc
import json
import typing
import weakref
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from built_anew import losses, make_task, task_of_another_process

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer
from stagewise.checkpoints.directory import write_checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.run import engine, work
from stagewise.run.engine import ChainSettings, sample
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.traces.cells import join_blocks, unpack
from stagewise.traces.diagnostics import diagnose_run
from stagewise.traces.store import RunMismatchError, TraceStore

POSTERIOR = LocalPosterior(window=5, n_beta=200.0)
SHORT = Chains(chains=2, draws=8, burn_in=5, thinning=2, batching="loop")
SGD = Optimizer("sgd", 0.05, batch_size=0)


def unseeded_task():
    return make_task(split_seed=int(torch.seed() % 1000) + 1)


def checkpoint(step, optimizer=SGD, **changed):
    params = {name: tensor.detach().clone() for name, tensor in make_task().model.state_dict().items()}
    return Checkpoint(step, params | changed, optimizer)


RUN = Trajectory.from_checkpoints([checkpoint(0), checkpoint(5), checkpoint(9)])


def sampled(out, task=None, run=RUN, **more):
    return sample(task or make_task(), run, POSTERIOR, out=out, sampling=SHORT, **more)


# What a cell holds.


def test_the_numbers_of_a_golden_cell_change_only_with_the_number_of_their_version():
    golden = json.loads((Path(__file__).parent / "golden_cell.json").read_text())
    tree = sample_block(make_task(), checkpoint(5), POSTERIOR, SHORT)
    now = {
        "loss": tree["train/loss"].values[0, :3, 0].tolist(),
        "loss_reflected": tree["queries/q/loss_reflected"].values[1, -1, :3].tolist(),
        "loss_anchor": tree["queries/q/loss_anchor"].values[:3].tolist(),
        "share": tree["train/share"].values[:1].tolist(),
        "curvature": [tree.attrs[name] for name in ("curvature_min", "curvature_max", "step_size", "gamma")],
    }
    same = set(now) == set(golden["numbers"]) and all(
        np.allclose(now[name], golden["numbers"][name], rtol=1e-6, atol=1e-6) for name in now
    )
    content = json.dumps({"numerics": engine.NUMERICS_VERSION, "numbers": now}, indent=1)
    if golden["numerics"] != engine.NUMERICS_VERSION:
        pytest.fail(f"NUMERICS_VERSION was raised; write the new numbers into golden_cell.json:\n{content}")
    if not same:
        pytest.fail(
            f"cells hold other numbers than before: raise NUMERICS_VERSION, and write golden_cell.json:\n{content}"
        )


def test_a_constant_in_the_loss_has_no_influence(tmp_path):
    plain, offset = (bif(sampled(tmp_path / str(o), make_task(o)), trusted_only=False) for o in (0.0, 1e7))
    for name in ("value", "stderr"):
        np.testing.assert_allclose(offset[name], plain[name], rtol=1e-4)
    assert (np.abs(plain["value"]) > 0).all()


def test_workers_give_the_bits_that_one_process_gives(tmp_path):
    alone, together = sampled(tmp_path / "a", steps=[0, 5]), sampled(tmp_path / "b", steps=[0, 5], workers=2)
    for step in (0, 5):
        assert alone.load(step).identical(together.load(step))


def test_cells_are_the_same_in_whatever_order_they_are_computed(tmp_path, monkeypatch):
    ascending = sampled(tmp_path / "a", steps=[0, 5], blocks=2)
    cells = work.Work.cells.fget
    monkeypatch.setattr(work.Work, "cells", property(lambda all_of: cells(all_of)[::-1]))
    descending = sampled(tmp_path / "b", steps=[0, 5], blocks=2)
    for name in ("00000000-0000.zip", "00000000-0001.zip", "00000005-0000.zip", "00000005-0001.zip"):
        first, second = (store.root / "cells" / name for store in (ascending, descending))
        assert first.read_bytes() == second.read_bytes()


# How it is called.


def test_settings_are_a_chains_or_single_fields_of_it_and_the_run_may_be_a_folder(tmp_path):
    for step in RUN.steps:
        write_checkpoint(tmp_path / "checkpoints", RUN.load(step))
    for number, folder in enumerate((tmp_path / "checkpoints", str(tmp_path / "checkpoints"))):
        store = sample(
            make_task(), folder, posterior=POSTERIOR, out=tmp_path / str(number), sampling=SHORT, chains=3, draws=2
        )
        assert store.steps == (0, 5, 9)
        assert dict(store.load(5)["train/loss"].sizes) == {"chain": 3, "draw": 2, "sample": 18}
    fields = {"chains": 2, "draws": 8, "burn_in": 5, "thinning": 2, "batching": "loop"}
    by_field = sample(make_task(), RUN, POSTERIOR, out=tmp_path / "fields", steps=[5], **fields)
    assert by_field.load(5).identical(sampled(tmp_path / "chains", steps=[5]).load(5))
    with pytest.raises(TypeError, match="chain"):
        sample(make_task(), RUN, POSTERIOR, out=tmp_path / "mistyped", chain=3)


def test_editors_are_told_every_setting_of_the_chains():
    hints = typing.get_type_hints(Chains)
    assert typing.get_type_hints(ChainSettings) == {field.name: hints[field.name] for field in fields(Chains)}


@pytest.mark.parametrize("steps", [[5, 7], []])
def test_steps_without_a_checkpoint_are_refused_with_those_there_are(tmp_path, steps):
    with pytest.raises(ValueError, match=r"there are \[0, 5, 9\]"):
        sampled(tmp_path / "out", steps=steps)
    assert not (tmp_path / "out").exists()


class Asked:
    """An executor that only says for how many workers, and for which folder, it was asked."""

    def map(self, setup, _cells, workers, _folder):
        self.workers, self.folder = workers, setup.store.root
        raise InterruptedError


def test_an_executor_is_asked_for_all_the_workers_it_has_room_for_and_else_this_process_works(tmp_path, monkeypatch):
    for given, workers in [({}, None), ({"workers": 3}, 3)]:
        asked = Asked()
        with pytest.raises(InterruptedError):
            sampled(tmp_path / "asked", executor=asked, **given)
        assert asked.workers == workers
    monkeypatch.setattr("stagewise.run.executors.Local.map", lambda *_: pytest.fail("other processes were asked for"))
    assert sampled(tmp_path / "here").steps == (0, 5, 9)


def test_workers_that_begin_in_another_folder_find_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = Asked()
    with pytest.raises(InterruptedError):
        sampled("beside", executor=asked)
    assert asked.folder == tmp_path / "beside"


# Continued runs.


def test_what_is_there_is_not_sampled_again(tmp_path, monkeypatch):
    visited = []

    def spy(task, checkpoint, *rest):
        visited.append(checkpoint.step)
        return sample_block(task, checkpoint, *rest)

    monkeypatch.setattr(work, "sample_block", spy)
    sampled(tmp_path, steps=[5])
    seen = []
    sampled(tmp_path, progress=lambda *state: seen.append(state))
    assert visited == [5, 0, 9]
    cells, steps = ([state[1:] for state in seen if state[0] == what] for what in ("sampling", "steps of this cell"))
    assert cells == [(1, 3), (2, 3), (3, 3)]
    totals = [total for done, total in steps if done == 1]
    assert len(totals) == 2
    assert steps == [(done + 1, total) for total in totals for done in range(total)]


def test_no_cell_is_held_in_memory_while_the_next_is_computed(tmp_path, monkeypatch):
    """Neither its traces nor what was written of them: trees are cycles, which reference counts do not free."""
    arrays, held = [], []

    def spy(of):
        def seen(*given):
            held.append(sum(array() is not None for array in arrays))
            tree = of(*given)
            arrays.append(weakref.ref(tree["train/loss"].values))
            return tree

        return seen

    monkeypatch.setattr(work, "sample_block", spy(sample_block))
    gc.disable()
    try:
        store = sampled(tmp_path)
        held.append(sum(array() is not None for array in arrays))
        monkeypatch.setattr("stagewise.traces.store.unpack", spy(unpack))
        monkeypatch.setattr("stagewise.traces.store.join_blocks", spy(join_blocks))
        arrays.clear()
        assert store.load(0)["train/loss"].sizes["draw"] == SHORT.draws
        packed = arrays[0]
    finally:
        gc.enable()
    assert held[:4] == [0, 0, 0, 0]
    assert packed() is None


def test_labels_are_there_before_the_first_cell_and_are_those_of_the_candidates(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "sample_block", killed)
    task = make_task(candidates=[3, 7])
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path, task)
    labels = TraceStore.read_only(tmp_path).labels
    assert labels["train"] == [str(task.train_groups[3]), str(task.train_groups[7])]
    assert labels["queries"] == {"q": task.query_groups["q"].tolist()}


def test_new_labels_replace_those_of_a_folder_that_is_reused(tmp_path):
    sampled(tmp_path, steps=[5])
    store = sampled(tmp_path, make_task(train_groups=["a", "b"] * 9), steps=[5])
    assert store.labels["train"] == ["a", "b"] * 9


def test_labels_stay_as_they_are_where_the_task_is_refused(tmp_path):
    before = sampled(tmp_path, steps=[5]).labels
    with pytest.raises(RunMismatchError):
        sampled(tmp_path, make_task(offset=1.0, train_groups=["a", "b"] * 9), steps=[5])
    assert TraceStore.read_only(tmp_path).labels == before


def test_other_weights_under_the_same_step_are_refused(tmp_path):
    sampled(tmp_path)
    other = Trajectory.from_checkpoints([checkpoint(5, bias=torch.ones(3).double())])
    with pytest.raises(RunMismatchError, match=r"step 5, block 0.*weights of the checkpoint"):
        sampled(tmp_path, run=other)
    both = Trajectory.from_checkpoints([other.load(5), checkpoint(20)])
    with pytest.raises(RunMismatchError):  # also where another step is asked for
        sampled(tmp_path, run=both, steps=[20])


# Checkpoints that cannot be used.


def unreadable(step):
    if step == 9:
        raise CheckpointError("step_9.pt cannot be read: unexpected end")
    return RUN.load(step)


BAD = {
    "learning rate 0": (checkpoint(9, replace(SGD, learning_rate=0.0)), "the learning rate at step 9 is 0"),
    "no optimiser": (checkpoint(9, None), "no record of its optimiser"),
    "another model": (checkpoint(9, weight=torch.zeros(3, 5).double()), "'weight' has shape (3, 5)"),
    "not finite": (checkpoint(9, bias=torch.full((3,), torch.nan).double()), "loss of sample 0 is not finite"),
}


@pytest.mark.parametrize("bad", list(BAD))
def test_a_checkpoint_that_cannot_be_used_is_left_out_with_its_reason_and_the_others_are_sampled(tmp_path, bad):
    last, reason = BAD[bad]
    run = Trajectory.from_checkpoints([checkpoint(0), checkpoint(5), last])
    store = sampled(tmp_path, run=run, blocks=2)
    verdicts = diagnose_run(store)
    assert store.steps == (0, 5, 9)
    assert verdicts["verdict"].values[-1] == "unusable"
    assert reason in verdicts["advice"].values[-1]
    assert "unusable" not in verdicts["verdict"].values[:-1]
    assert store.load(9)["chains/status"].values.tolist() == ["unusable"] * 4
    influence = bif(store, trusted_only=False)
    assert influence["step"].values.tolist() == [0, 5]
    assert reason in json.loads(influence.attrs["omitted"])["9"]
    assert sampled(tmp_path, run=run, blocks=2).steps == (0, 5, 9)  # and goes on like any other


def test_a_file_that_cannot_be_read_is_left_out_too(tmp_path):
    store = sampled(tmp_path, run=Trajectory((0, 5, 9), unreadable))
    assert "unexpected end" in diagnose_run(store)["advice"].values[-1]


def test_nothing_is_written_where_no_checkpoint_can_be_used_and_one_reason_is_said_once(tmp_path):
    run = Trajectory.from_checkpoints([checkpoint(0, None), checkpoint(5, None)])
    with pytest.raises(ValueError, match="no record of its optimiser") as error:
        sampled(tmp_path / "out", run=run)
    assert str(error.value).count("no record of its optimiser") == 1
    run = Trajectory.from_checkpoints([checkpoint(0, None), checkpoint(5, replace(SGD, learning_rate=0.0))])
    with pytest.raises(ValueError, match=r"step 0: .*no record of its optimiser.*step 5: the learning rate") as error:
        sampled(tmp_path / "out", run=run)
    assert not (tmp_path / "out").exists()


# A task that is built again.


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unseeded_split_is_refused_before_any_cell_is_computed(tmp_path, workers):
    with pytest.raises(ValueError, match=r"task\(\) is not deterministic.*query 'q' and training data differ.*seed"):
        sampled(tmp_path, unseeded_task(), make_task=unseeded_task, workers=workers)
    assert not list(tmp_path.glob("cells/*"))


def test_a_worker_whose_task_is_another_one_computes_nothing(tmp_path):
    build = partial(task_of_another_process, 0)
    with pytest.raises(ValueError, match=r"task\(\) is not deterministic: .*training data differ"):
        sampled(tmp_path, build(), make_task=build, workers=2)
    assert not list(tmp_path.glob("cells/*"))


def task_with_another_constant():
    """Only numbers tell it from the first."""
    task = make_task()
    task.loss = Constant()
    return task


class Constant:
    made = 0

    def __init__(self):
        Constant.made += 1
        self.constant = float(Constant.made)

    def __call__(self, model, batch):
        return losses(model, batch) * self.constant


def test_a_loss_that_is_another_one_each_time_is_found_by_its_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"not deterministic: its gradient of the objective, query 'q' and training"):
        sampled(tmp_path, task_with_another_constant(), make_task=task_with_another_constant)
