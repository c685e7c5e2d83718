"""Scores of other tools, judged by a run: from their files to the report."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from tiny import task as tiny_task
from tiny import write_run
from typer.testing import CliRunner

import stagewise as sw
import written
from stagewise.cli import app
from stagewise.run.config import load_config
from stagewise.run.estimators import estimate
from stagewise.run.source import trajectory_of
from stagewise.traces.lock import run_lock

cli = CliRunner()
STEPS = [5, 20, 40]


def sampled_queries():
    """The same data; every query sample is a query of its own."""
    whole = tiny_task()
    train, query = (data.batch(slice(None)) for data in (whole.train, whole.queries["test"]))
    return sw.Task(
        whole.pure.module, whole.loss, train=train, queries={"test": query}, query_groups={"test": range(16)}
    )


def of_candidates():
    whole = tiny_task()
    train, query = (data.batch(slice(None)) for data in (whole.train, whole.queries["test"]))
    return sw.Task(
        whole.pure.module,
        whole.loss,
        train=train,
        queries={"up": query, "down": query},
        query_groups={"up": ["a"] * 12 + ["b"] * 4},
        candidates=[3, 10, 20],
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of exact influence and retraining, and its exact influence of every sample on every query sample."""
    path = write_run(tmp_path_factory.mktemp("import"), estimators=["exact"], retraining={"recorded_order_seed": 0})
    result = cli.invoke(app, ["run", str(path)])
    assert result.exit_code == 0, result.output
    config = load_config(path)
    trajectory = trajectory_of(config.checkpoints, config.steps, config.clip_norm, config.batch_size)
    exact = estimate("exact", sampled_queries(), trajectory, config, "sample")(steps=STEPS)
    return path.parent / "run", exact["value"]


@pytest.fixture
def run(finished):
    folder, exact = finished
    yield folder, exact
    for path in (folder / "imported").glob("*"):
        path.unlink()


def put(folder, path, *options, step=20, name="other", fails=False):
    result = cli.invoke(app, ["import", str(folder), str(path), "--name", name, "--step", str(step), *options])
    assert result.exit_code == int(fails), result.output
    return result.output


def saved(path, scores):
    np.save(path / "scores.npy", scores)
    return path / "scores.npy"


def test_our_own_exact_influence_by_another_tools_folder_agrees_perfectly_and_survives_the_next_run(run, tmp_path):
    folder, exact = run
    for step in reversed(STEPS):
        scores = written.bergson(tmp_path / f"{step}", -1e3 * exact.sel(step=step).values, "float64")
        text = put(folder, scores, step=step, name="bergson")
        assert "24 x 16 scores (bergson 2.5.1) as influence of 2 train groups on 2 queries" in text
    assert cli.invoke(app, ["run", str(folder / "config.yaml")]).exit_code == 0
    results = sw.report(folder)
    imported, own = results.baselines["bergson"], results.exact
    np.testing.assert_allclose(imported["value"], 1e3 * own["value"], rtol=1e-6)
    assert imported["step"].values.tolist() == STEPS
    assert not imported["stderr"].any()
    for scores in (results.agreements, results.size_checks):
        assert np.isnan(scores["bergson"]["slope"]).all()  # no unit
    np.testing.assert_allclose(results.size_checks["bergson"]["correlation"], 1, rtol=1e-9)
    agreed = results.agreements["bergson"]["correlation"]
    np.testing.assert_allclose(agreed, results.agreements["exact influence"]["correlation"], rtol=1e-6)
    assert "bergson: slope" in (folder / "report.html").read_text()


def test_scores_in_nats_are_held_against_sizes_too_and_a_wrong_sign_shows(run, tmp_path):
    folder, exact = run
    path = saved(tmp_path, -2 * exact.sel(step=20).values.T)
    put(folder, path, "--helpful", "positive", "--transpose", "--nats", name="right")
    put(folder, path, "--helpful", "negative", "--transpose", "--nats", name="wrong")
    checks = sw.report(folder).size_checks
    np.testing.assert_allclose(checks["right"]["slope"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(checks["wrong"]["correlation"], -1, rtol=1e-6)


def test_columns_may_be_the_query_groups_themselves(run, tmp_path):
    folder, exact = run
    classes = torch.arange(24, 40).numpy() % 2
    columns = np.stack([exact.sel(step=20).values[:, classes == k].mean(1) for k in (0, 1)], 1)
    put(folder, saved(tmp_path, columns), "--helpful", "negative")
    np.testing.assert_allclose(sw.report(folder).size_checks["other"]["correlation"], 1, rtol=1e-9)


def test_what_does_not_fit_is_refused_in_a_line_and_nothing_is_written(run, tmp_path):
    folder, _ = run
    fits = saved(tmp_path, np.ones((24, 16)))
    refused = partial(put, folder, fails=True)
    assert "no checkpoint at step 7; it has [5, 20, 40]" in refused(fits, "--helpful", "positive", step=7)
    assert "does not say whether helpful" in refused(fits)
    assert "none of ['BIF'" in refused(fits, "--helpful", "positive", name="Exact influence")
    assert "name must be" in refused(fits, "--helpful", "positive", name="../results")
    assert "--trained must be FIRST:END" in refused(fits, "--helpful", "positive", "--trained", "30")
    assert "16 rows, where the run has 24 training" in refused(
        saved(tmp_path, np.ones((16, 24))), "--helpful", "positive"
    )
    assert "3 columns, where the run has 16 query samples (16 of 'test') and 2 query groups" in refused(
        saved(tmp_path, np.ones((24, 3))), "--helpful", "positive"
    )
    (tmp_path / "ids").write_text("a\nb\n")
    assert "leave it out" in refused(fits, "--helpful", "positive", "--train-ids", str(tmp_path / "ids"))
    assert "no run folder" in put(tmp_path, fits, "--helpful", "positive", fails=True)
    assert not list((folder / "imported").glob("*"))


def test_a_step_is_imported_once_and_a_unit_is_not_mixed(run, tmp_path):
    folder, _ = run
    path = saved(tmp_path, np.ones((24, 16)))
    put(folder, path, "--helpful", "positive")
    before = (folder / "imported" / "other.json").read_bytes()
    assert "other of step 20 was imported before" in put(folder, path, "--helpful", "negative", fails=True)
    assert "in another unit" in put(folder, path, "--helpful", "positive", "--nats", step=40, fails=True)
    with run_lock(folder):
        assert "is in use by" in put(folder, path, "--helpful", "positive", step=40, fails=True)
    assert (folder / "imported" / "other.json").read_bytes() == before
    assert [path.name for path in (folder / "imported").iterdir()] == ["other.json"]


@pytest.mark.parametrize("rows", ["candidates", "training set"])
def test_rows_of_candidates_alone_and_columns_of_several_query_sets_land_where_they_belong(tmp_path, rows):
    path = write_run(tmp_path, task=f"{__file__}:of_candidates", estimators=["gradient"], retraining=None, steps=[20])
    assert cli.invoke(app, ["run", str(path)]).exit_code == 0
    whole = np.arange(24.0)[:, None] * 100 + np.arange(32)
    scores = saved(tmp_path, whole[[3, 10, 20]] if rows == "candidates" else whole)
    put(tmp_path / "run", scores, "--helpful", "negative")
    value = sw.report(tmp_path / "run").baselines["other"]["value"].sel(step=20)
    assert value["query"].values.tolist() == ["up:a", "up:b", "down"]
    means = np.array([np.arange(12).mean(), np.arange(12, 16).mean(), np.arange(16, 32).mean()])
    np.testing.assert_allclose(value.sel(train=["3", "10", "20"]), np.array([[300], [1000], [2000]]) + means)


def test_candidates_that_were_not_scored_are_named(run):
    folder, _ = run
    scores = sw.read_scores(saved(folder.parent, np.ones((22, 16))), helpful="positive")
    some = scores.assign_coords(train=[*range(10), *range(12, 24)])
    with pytest.raises(ValueError, match="2 of the run's 24 candidates have no scores, the first of them sample 10"):
        sw.import_scores(folder, some, name="other", step=20)
    with pytest.raises(ValueError, match="each once"):
        sw.import_scores(folder, scores.assign_coords(train=[0] * 22), name="other", step=20)


@pytest.mark.parametrize(
    ("of_now", "note"),
    [
        ({"groups": "the same labels and sizes, other members"}, "Without other: it was imported for other groups"),
        ({"checkpoints": '{"20": "trained again"}'}, "Without other: it was imported for other checkpoints"),
    ],
)
def test_scores_for_what_the_run_no_longer_has_are_left_out_with_a_note(run, tmp_path, of_now, note):
    folder, _ = run
    put(folder, saved(tmp_path, np.ones((24, 16))), "--helpful", "positive")
    losses = folder / "results" / "losses.json"
    before = losses.read_text()
    content = json.loads(before)
    content["attrs"] |= of_now
    losses.write_text(json.dumps(content))
    try:
        results = sw.report(folder)
    finally:
        losses.write_text(before)
    assert "other" not in results.baselines
    assert any(note in one for one in results.notes)


def test_scores_of_one_checkpoint_that_was_trained_again_are_left_out_alone(run, tmp_path):
    folder, _ = run
    path = saved(tmp_path, np.ones((24, 16)))
    put(folder, path, "--helpful", "positive", step=5)
    put(folder, path, "--helpful", "positive", step=20)
    losses = folder / "results" / "losses.json"
    before = losses.read_text()
    content = json.loads(before)
    content["attrs"]["checkpoints"] = json.dumps(json.loads(content["attrs"]["checkpoints"]) | {"20": "again"})
    losses.write_text(json.dumps(content))
    try:
        results = sw.report(folder)
    finally:
        losses.write_text(before)
    assert results.baselines["other"]["step"].values.tolist() == [5]
    assert any("Without other at step 20" in note for note in results.notes)


def test_names_that_share_a_file_on_some_systems_are_refused(run, tmp_path):
    folder, _ = run
    path = saved(tmp_path, np.ones((24, 16)))
    put(folder, path, "--helpful", "positive", name="trak")
    assert "in a file that TRAK would share" in put(folder, path, "--helpful", "positive", name="TRAK", fails=True)
    assert "with a letter or digit at both ends" in put(folder, path, "--helpful", "positive", name="a.", fails=True)


def test_a_task_on_other_data_is_refused_because_samples_have_only_numbers(run, tmp_path):
    folder, _ = run
    config = folder / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("task_args: {}", "task_args: {shift: 1.0}"))
    try:
        assert config.read_text() != text
        message = put(folder, saved(tmp_path, np.ones((24, 16))), "--helpful", "positive", fails=True)
    finally:
        config.write_text(text)
    assert "a run on other data" in message
    assert "query 'test', training data" in message


def test_what_is_imported_says_where_it_came_from(run, tmp_path):
    folder, _ = run
    path = saved(tmp_path, np.ones((24, 16)))
    put(folder, path, "--helpful", "positive", step=5)
    put(folder, path, "--helpful", "positive", step=40)
    data = sw.report(folder).baselines["other"]
    assert data.attrs["units"] == data["value"].attrs["units"] == "arbitrary unit"
    said = json.loads(data.attrs["imported"])["40"]
    assert said.pop("checkpoint")
    assert said == {"tool": "scores.npy", "source": str(path), "columns": "samples"}
