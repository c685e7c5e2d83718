"""Slices of a run: in one folder or in several, what is missing, and who may work beside whom."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import yaml
from test_resume import contents
from tiny import write_run
from typer.testing import CliRunner

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.cli import app
from stagewise.run.config import load_config
from stagewise.run.opened import open_run
from stagewise.run.pipeline import merge, run, run_slice
from stagewise.run.progress import silent
from stagewise.run.slices import Slice
from stagewise.run.status import status
from stagewise.traces.lock import RunLockedError
from stagewise.traces.store import RunFolderError, RunMismatchError

BRIEF = {"retraining": None, "estimators": ["bif", "gradient"], "per": "group"}


def said(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = load_config(write_run(tmp_path_factory.mktemp("whole"), **BRIEF))
    run(config)
    return config.out


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/3"])
def test_a_slice_that_does_not_exist_is_refused_with_how_array_jobs_are_numbered(tmp_path, text):
    code, words = said("run", write_run(tmp_path, **BRIEF), "--cells", text)
    assert code == 1
    assert "--array=1-16" in words
    assert not (tmp_path / "run").exists()


def test_slices_in_folders_of_their_own_are_merged_into_a_new_one_with_the_same_bits(tmp_path, whole):
    config = write_run(tmp_path, **BRIEF)
    for number in (1, 2):
        code, words = said("run", config, "--cells", f"{number}/2", "-s", f"out=slice-{number}")
        assert code == 0, words
        assert "its 3 cells are complete" in words
    code, words = said("status", tmp_path / "slice-1")
    assert code == 1
    assert "3 cells are missing" in words
    code, words = said("merge", tmp_path / "all", tmp_path / "slice-1")
    assert code == 1
    assert "lacks 3 of 6 cells" in words
    code, words = said("merge", tmp_path / "all", tmp_path / "slice-1", tmp_path / "slice-2")
    assert code == 0, words
    assert contents(tmp_path / "all") == contents(whole)
    assert not (tmp_path / "slice-1" / "report.html").exists()
    code, words = said("status", tmp_path / "all")
    assert code == 0, words
    assert "complete; report" in words


def test_a_slice_of_other_cells_is_refused_and_none_of_its_cells_is_computed(tmp_path):
    config = load_config(write_run(tmp_path, **BRIEF))
    run_slice(config, Slice(1, 3))
    before = contents(config.out)
    other = config.model_copy(update={"estimators": ("bif",)})
    with pytest.raises(RunMismatchError, match="6 .*there are 3 .*same configuration"):
        run_slice(other, Slice(2, 3))
    assert contents(config.out) == before
    assert status(config.out).failures["slice-2-of-3"].startswith(str(config.out))
    run_slice(config, Slice(2, 3))
    assert not status(config.out).failures


def test_folders_of_different_runs_are_not_merged(tmp_path):
    config = load_config(write_run(tmp_path, **BRIEF))
    for folder, draws in (("a", 40), ("b", 41)):
        sampling = {"chains": 4, "draws": draws, "batching": "stacked"}
        changed = tmp_path / f"{folder}.yaml"
        changed.write_text(
            yaml.safe_dump(yaml.safe_load((tmp_path / "config.yaml").read_text()) | {"sampling": sampling})
        )
        run_slice(load_config(changed, [f"out={folder}"]), Slice(1, 3))
    with pytest.raises(RunMismatchError, match="sampling"):
        merge(tmp_path / "a", [tmp_path / "b"])
    with pytest.raises(RunFolderError, match="no run folder"):
        merge(tmp_path / "a", [tmp_path / "nothing"])
    assert config.out != tmp_path / "a"


def test_who_works_on_a_slice_keeps_out_the_whole_run_and_the_same_slice_but_no_other_slice(tmp_path):
    config = load_config(write_run(tmp_path, **BRIEF))
    with ExitStack() as at_work:
        at_work.enter_context(open_run(config, silent).beside_others(Slice(1, 2)))
        assert [who.split(":")[0] for who in status(config.out).at_work] == ["slice-1-of-2"]
        for refused in (lambda: run(config), lambda: run_slice(config, Slice(1, 2))):
            with pytest.raises(RunLockedError, match="in use by process"):
                refused()
        run_slice(config, Slice(2, 2))
    with open_run(config, silent).alone(), pytest.raises(RunLockedError):
        run_slice(config, Slice(1, 2))
    run_slice(config, Slice(1, 2))
    merge(config.out)


def test_a_result_that_does_not_exist_is_complete_as_its_reason_and_tried_again_by_the_next_run(tmp_path, monkeypatch):
    config = load_config(write_run(tmp_path, **BRIEF | {"estimators": ["gradient"]}))
    calls = []

    def refused(*_given, steps=None, **_settings):
        calls.append(steps)
        raise ValueError("there is no gradient today")

    with monkeypatch.context() as patch:
        opened = open_run(config, silent)
        patch.setattr("stagewise.run.estimators.gradient_product", refused)
        with opened.beside_others(Slice(1, 1)):
            opened.crew.compute(opened.cells)
        assert len(calls) == 3
        assert not status(config.out).missing
        opened.crew.compute(opened.cells)
        assert len(calls) == 3
    assert [path.read_text() for path in (config.out / "kept").glob("*.refused")] == ["there is no gradient today"] * 3
    results = run(config)
    assert results.baselines["gradient product"].step.values.tolist() == [5, 20, 40]
    assert not list((config.out / "kept").glob("*.refused"))


def test_a_checkpoint_that_is_another_one_where_a_worker_is_is_named_and_nothing_written(tmp_path):
    config = load_config(write_run(tmp_path, **BRIEF))
    opened = open_run(config, silent)
    there = opened.work.trajectory

    def elsewhere(step):
        checkpoint = there.load(step)
        return replace(checkpoint, params={name: tensor + 1e-6 for name, tensor in checkpoint.params.items()})

    work = replace(opened.work, trajectory=Trajectory(there.steps, elsewhere))
    for cell in (opened.cells[0], opened.cells[-1]):
        with pytest.raises(ValueError, match=f"checkpoint of step {cell.step} is another one on"):
            work.compute(opened.task, cell)
        assert not work.is_complete(cell)


def test_the_last_cell_alone_is_computed_with_the_threads_of_a_worker_as_its_bits_depend_on_them(tmp_path, monkeypatch):
    opened = open_run(load_config(write_run(tmp_path, **BRIEF | {"workers": 2})), silent)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(type(opened.work), "compute", lambda *_: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(type(opened.crew), "_see", lambda *_: None)
    try:
        torch.set_num_threads(4)
        opened.crew.compute(opened.cells[:1])
        assert seen == [2]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
