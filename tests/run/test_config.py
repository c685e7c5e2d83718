"""A configuration means the same wherever it lies, and says what it does not understand."""

import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from stagewise.run import yaml12
from stagewise.run.config import ConfigError, Retraining, RunConfig, describe, load_config, make_config, save_config
from stagewise.run.config import _documented as documented
from stagewise.run.executors import Ray, Slurm
from stagewise.sampling.chains import Chains

MINIMAL = {"task": "t.py:task", "checkpoints": "ckpt", "out": "run", "posterior": {"window": 3}}


def written(folder, text="", **changes):
    """A configuration file with the minimal content, changed, and more text."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(yaml12.dump(MINIMAL | changes) + text, encoding="utf-8")
    return path


# Values


def test_numbers_and_words_of_a_file_and_of_the_command_line_are_read_alike(tmp_path):
    text = "task_args: {rate: 1e-3, mode: on, at: 1:30, day: 2024-01-31, mask: 0o17}\n"
    from_file = load_config(written(tmp_path, text)).task_args
    overrides = ["rate=1e-3", "mode=on", "at=1:30", "day=2024-01-31", "mask=0o17"]
    assert load_config(written(tmp_path), [f"task_args.{one}" for one in overrides]).task_args == from_file
    assert from_file == {"rate": 0.001, "mode": "on", "at": "1:30", "day": "2024-01-31", "mask": 15}


def test_a_number_in_scientific_notation_sets_a_number(tmp_path):
    config = load_config(written(tmp_path, "sampling: {step_size: 1e-3}\n"), ["posterior.n_beta=1e4"])
    assert config.sampling.step_size == 0.001
    assert config.posterior.n_beta == 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers: 1:30\n", "workers: .*integer"),
        ("workers: 2\nworkers: 3\n", "'workers' stands twice"),
        ("title: [\n", "not valid YAML"),
        ("retraining: {orders: 2}\n", "retraining.orders: unknown key"),
        ("estimators: [gradients]\n", "gradient"),
        ("sampling: {sampler: sgdl}\n", "sampling.sampler: .*sgld"),
        ("sampling: {sampler: window, burn_in: 3}\n", "draws independently, and has no burn_in"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


def test_a_sampler_of_windows_is_refused_without_one(tmp_path):
    with pytest.raises(ConfigError, match="draws by the updates of a window, got gamma=2.0"):
        load_config(written(tmp_path, "sampling: {sampler: window}\n", posterior={"gamma": 2.0}))


@pytest.mark.parametrize("override", ["steps=[1,", "title=a: b: c", "sampling.draws", "title.x=1"])
def test_an_override_that_cannot_be_read_is_an_error_of_the_configuration(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        load_config(written(tmp_path, title="t"), [override])


def test_an_override_reaches_into_a_section_that_is_empty(tmp_path):
    assert load_config(written(tmp_path, "sampling:\nretraining:\n"), ["sampling.draws=7", "retraining.repeats=2"])


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"c\.yaml.*not a text file"):
        load_config(tmp_path / "c.yaml")


# Places


@pytest.mark.parametrize("text", ["~/a b/x", "$PLACE/x", "${PLACE}/x", "$PLACE_OF_HOME/../x"])
def test_home_and_variables_are_put_into_every_path(tmp_path, monkeypatch, text):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    monkeypatch.setenv("PLACE_OF_HOME", "~/of")
    right = os.path.normpath(os.path.expanduser(os.path.expandvars(text)))
    config = load_config(written(tmp_path, out=text, checkpoints=text, task=f"{text}/t.py:task"))
    assert (str(config.out), str(config.checkpoints), config.task) == (right, right, f"{right}/t.py:task")
    assert right.startswith(str(tmp_path))
    by_command = load_config(written(tmp_path), [f"out={text}"])
    assert by_command.out == config.out


@pytest.mark.parametrize("key", ["task", "checkpoints", "out"])
@pytest.mark.parametrize(("text", "name"), [("$NOWHERE/x.py:t", "NOWHERE"), ("x/${EMPTY}/y.py:t", "EMPTY")])
def test_a_variable_that_is_not_set_is_named_and_no_folder_of_its_name_made(tmp_path, monkeypatch, key, text, name):
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError, match=rf"{key}: .*{name} is not set"):
        load_config(written(tmp_path, **{key: text}))


def test_the_home_of_nobody_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"out: .*~no_such_user_here"):
        load_config(written(tmp_path, out="~no_such_user_here/x"))


def test_a_doubled_dollar_is_a_dollar_and_a_tilde_inside_is_a_tilde(tmp_path):
    config = load_config(written(tmp_path, out="a$$b/~c", checkpoints="./~d"))
    assert (config.out, config.checkpoints) == (tmp_path / "a$b/~c", tmp_path / "~d")


# Saved and moved


def project(folder):
    """A project with its task, its checkpoints and one run folder in runs/."""
    for name in ("ckpt", "runs/first"):
        (folder / name).mkdir(parents=True)
    (folder / "t.py").touch()
    config = load_config(written(folder, out="runs/first", title="1e-3", task_args={"mode": "on"}))
    save_config(config, config.out / "config.yaml")
    return config


def test_a_saved_configuration_is_the_same_one(tmp_path):
    config = project(tmp_path / "$odd ~name")
    assert load_config(config.out / "config.yaml") == config


def test_a_run_folder_that_moves_alone_runs_where_it_is_with_what_stayed_behind(tmp_path):
    config = project(tmp_path / "a")
    shutil.move(config.out, tmp_path / "archive" / "deep" / "first")
    moved = load_config(tmp_path / "archive" / "deep" / "first" / "config.yaml")
    assert moved == config.model_copy(update={"out": tmp_path / "archive" / "deep" / "first"})


def test_a_project_that_moves_runs_where_it_is_and_leaves_the_old_place_alone(tmp_path):
    config = project(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_config(tmp_path / "b/runs/first/config.yaml")
    assert moved.out == tmp_path / "b/runs/first"
    assert moved.checkpoints == tmp_path / "b/ckpt"
    assert moved.task == f"{tmp_path}/b/t.py:task"
    assert moved.title == config.title
    save_config(moved, moved.out / "config.yaml")
    assert load_config(moved.out / "config.yaml") == moved


def test_what_lies_in_the_run_folder_moves_with_it(tmp_path):
    (tmp_path / "run/~c$k").mkdir(parents=True)
    config = load_config(written(tmp_path, checkpoints="run/~c$$k", task="stagewise.studies.digits.training:task"))
    save_config(config, config.out / "config.yaml")
    assert yaml.safe_load((config.out / "config.yaml").read_text())["out"] == "."
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    moved = load_config(tmp_path / "copy/config.yaml")
    assert (moved.out, moved.checkpoints, moved.task) == (tmp_path / "copy", tmp_path / "copy/~c$k", config.task)


def test_what_lies_far_away_is_saved_as_it_is(tmp_path):
    config = load_config(written(tmp_path / "x/y/z", checkpoints=str(tmp_path / "data/ckpt")))
    config.out.mkdir()
    save_config(config, config.out / "config.yaml")
    assert yaml.safe_load((config.out / "config.yaml").read_text())["checkpoints"] == str(tmp_path / "data/ckpt")


def test_a_module_beside_the_configuration_is_taken_before_an_installed_one(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/t.py").touch()
    config = load_config(written(tmp_path, task="pkg.t:task"))
    assert config.task == f"{tmp_path}/pkg.t:task"
    config.out.mkdir()
    save_config(config, config.out / "config.yaml")
    assert load_config(config.out / "config.yaml") == config
    assert load_config(written(tmp_path, task="json:task")).task == "json:task"


# Words


def test_every_setting_is_described_with_its_meaning_and_default():
    text = describe()
    for name, field in [*RunConfig.model_fields.items(), *Retraining.model_fields.items()]:
        assert f"{name}: {field.description}" in text
    for line in text.splitlines():
        meaning = line.partition(": ")[2].partition(" (default")[0]
        assert len(meaning) > 5, line
    assert "exact, bif, damped, gradient" in text


def test_meanings_are_found_in_docstrings_as_python_3_13_keeps_them():
    indented = Chains.__doc__
    first, _, rest = indented.partition("\n")
    dedented = "\n".join([first, *(line.removeprefix("    ") for line in rest.splitlines())])
    assert documented(dedented) == documented(indented)
    assert documented(indented).keys() == {field.name for field in fields(Chains)}
    assert documented(indented)["chains"] == "chains in a block; they run together"
    assert documented(indented)["seed"].endswith("less noisy")


def test_a_setting_whose_meaning_spans_lines_is_joined():
    @dataclass
    class Settings:
        """What.

        Attributes:
            a: first,
                and more: this.
            b: second.

        Raises:
            ValueError: never.
        """

    assert documented(Settings.__doc__) == {"a": "first, and more: this", "b": "second"}


def test_paths_given_in_python_are_left_as_they_are():
    assert make_config(MINIMAL | {"out": Path("~/$x")}).out == Path("~/$x")


def test_settings_of_an_executor_that_is_named_alone_can_be_overridden(tmp_path):
    path = written(tmp_path, executor="slurm")
    assert load_config(path, ["executor.jobs=3"]).executor == Slurm(jobs=3)
    assert load_config(path, ["executor=ray", "executor.cpus=2"]).executor == Ray(cpus=2)


def test_settings_of_an_executor_without_its_name_are_of_this_machine(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("{task: 't.py:task', checkpoints: c, out: o, posterior: {window: 3}}")
    assert load_config(path, ["executor.threads=2"]).executor.model_dump()["threads"] == 2
    assert load_config(path, ["executor=ray", "executor.cpus=2"]).executor.name == "ray"
    with pytest.raises(ConfigError, match="jobs"):
        load_config(path, ["executor.jobs=2"])
