"""Results without chains are not taken for those of a task that only numbers tell from the one they are of."""

import pytest
import yaml
from tiny import task, write_run
from typer.testing import CliRunner

from stagewise.cli import app
from stagewise.run.config import load_config
from stagewise.run.pipeline import merge, run, run_slice
from stagewise.run.slices import Slice
from stagewise.task import Task
from stagewise.traces.store import RunMismatchError

BRIEF = {"retraining": None, "estimators": ["exact", "gradient"], "per": "group"}


class Scaled:
    """A loss whose state is not in its text."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, model, batch):
        inputs, targets = batch
        rows = model(inputs).log_softmax(-1)
        return -self.scale * rows[range(len(rows)), targets]


def scaled_task(scale=1.0):
    this = task()
    return Task(this.model, Scaled(scale), train=this.train, queries=this.queries, train_groups=this.train_groups)


def write(folder, scale, **more):
    return load_config(write_run(folder, task=f"{__file__}:scaled_task", task_args={"scale": scale}, **BRIEF, **more))


def test_a_loss_with_other_state_is_refused_in_the_folder_of_the_first_and_told_what_to_do(tmp_path):
    run(write(tmp_path, 1.0))
    with pytest.raises(RunMismatchError, match=r"losses at step 5 \(.*\) are no longer those.*out=\.\.\."):
        run(write(tmp_path, 5.0))
    run(write(tmp_path, 1.0))


def test_a_run_that_was_killed_after_a_few_cells_does_not_go_on_with_another_loss(tmp_path):
    run_slice(write(tmp_path, 1.0), Slice(1, 6))
    with pytest.raises(RunMismatchError, match="are no longer those"):
        run(write(tmp_path, 5.0))


@pytest.mark.parametrize("parts", [(1, 2), (2, 1)])
def test_slices_of_different_losses_in_folders_of_their_own_are_not_merged(tmp_path, parts):
    for part, scale in zip(parts, (1.0, 5.0), strict=True):
        run_slice(write(tmp_path, scale, out=f"slice-{part}"), Slice(part, 2))
    with pytest.raises(RunMismatchError, match="are no longer those"):
        merge(tmp_path / "all", [tmp_path / "slice-1", tmp_path / "slice-2"])


def test_a_slice_that_is_refused_leaves_the_settings_of_the_others_as_they_were(tmp_path):
    config = write(tmp_path, 1.0)
    run_slice(config, Slice(1, 2))
    before = (config.out / "config.yaml").read_text()
    with pytest.raises(RunMismatchError, match="is being filled with other cells"):
        run_slice(config.model_copy(update={"estimators": ("exact",)}), Slice(2, 2))
    assert (config.out / "config.yaml").read_text() == before
    assert set(yaml.safe_load(before)["estimators"]) == {"exact", "gradient"}


def test_what_slices_failed_at_is_forgotten_once_all_is_computed(tmp_path):
    config = write(tmp_path, 1.0)
    run_slice(config, Slice(1, 2))
    (config.out / "failed").mkdir(exist_ok=True)
    (config.out / "failed" / "slice-2-of-2.txt").write_text("no memory")
    run(config)
    result = CliRunner().invoke(app, ["status", str(config.out)])
    assert (result.exit_code, "no memory" in result.output) == (0, False)


def test_urls_among_the_folders_to_merge_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folders in (["s3://bucket/run", "slice-1"], ["all", "s3://bucket/run"]):
        result = CliRunner().invoke(app, ["merge", *folders])
        assert (result.exit_code, "give its url alone" in " ".join(result.output.split())) == (1, True)
    assert not list(tmp_path.iterdir())
