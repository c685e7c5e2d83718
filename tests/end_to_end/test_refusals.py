"""What must never be mixed is refused by name, and what is already there survives."""

import pytest
import yaml
from tiny import write_run

from stagewise.run.config import ConfigError, load_config
from stagewise.run.pipeline import run
from stagewise.traces.store import RunLockedError, RunMismatchError, TraceStore


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = write_run(tmp_path_factory.mktemp("run"), retraining=None, estimators=["bif"])
    run(load_config(config))
    return config


def changed(config, **changes):
    content = yaml.safe_load(config.read_text()) | changes
    path = config.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"task_args": {"shift": 0.1}}, "training data"),
        ({"task_args": {"shift": 0.1}}, "query 'test'"),
        ({"task_args": {"loss": "other_losses"}}, "loss"),
        ({"posterior": {"window": 11}}, "posterior"),
        ({"posterior": {"window": 10, "parameters": ["bias"]}}, "posterior"),
        ({"sampling": {"chains": 4, "draws": 41, "batching": "stacked"}}, "sampling"),
    ],
)
def test_run_folder_of_another_run_is_refused_by_part(finished, changes, part):
    with pytest.raises(RunMismatchError, match=part):
        run(changed(finished, **changes))


def test_checkpoint_of_another_model_is_refused(finished):
    with pytest.raises(ValueError, match=r"shape.*expects"):
        run(changed(finished, task_args={"width": 4}, out="other"))


def test_changed_weights_under_an_old_run_are_refused(finished, tmp_path):
    config = write_run(tmp_path, retraining=None, estimators=["bif"])
    run(load_config(config))
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    checkpoints[0].write_bytes(checkpoints[0].read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(RunMismatchError, match="step 5"):
        run(load_config(config))


def test_second_process_on_a_run_folder_is_refused(finished):
    config = load_config(finished)
    store = TraceStore.open(config.out, TraceStore.read_only(config.out).identity)
    with store.lock(), pytest.raises(RunLockedError):
        run(config)


def test_later_blocks_may_be_added_to_a_finished_run(tmp_path):
    config = write_run(tmp_path, retraining=None, estimators=["bif"])
    run(load_config(config))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "cells").iterdir()}
    run(load_config(config, ["sampling.blocks=2"]))
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "cells").iterdir()}
    assert len(after) == 2 * len(before)
    assert {p: after[p] for p in before} == before


def test_unknown_keys_name_the_nearest_valid_one(tmp_path):
    config = write_run(tmp_path, sampling={"draw": 40}, windw=3)
    with pytest.raises(ConfigError) as error:
        load_config(config)
    assert "did you mean 'draws'" in str(error.value)
    assert "windw: unknown key" in str(error.value)


def test_every_fault_of_a_configuration_is_listed(tmp_path):
    config = write_run(tmp_path, posterior={"window": -1}, workers=0)
    with pytest.raises(ConfigError, match=r"(?s)posterior.*window must be positive.*workers"):
        load_config(config)


def test_overrides_change_the_configuration(tmp_path):
    config = load_config(write_run(tmp_path), ["sampling.draws=7", "posterior.window=12"])
    assert config.sampling.draws == 7
    assert config.posterior.window == 12


def test_resolved_configuration_runs_again(finished):
    config = load_config(finished)
    again = load_config(config.out / "config.yaml")
    assert again == config


def test_fewer_steps_than_the_folder_holds_still_give_a_report(finished, tmp_path):
    config = write_run(tmp_path, retraining={"repeats": 1})
    run(load_config(config))
    results = run(load_config(config, ["steps=[20, 40]"]))
    assert results.losses["step"].values.tolist() == [20, 40]
    assert (tmp_path / "run" / "report.html").exists()
