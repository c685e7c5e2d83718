"""The commands as a person types them."""

import pytest
import yaml
from tiny import write_run
from typer.testing import CliRunner

import stagewise as sw
from stagewise.cli import app

cli = CliRunner()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = write_run(tmp_path_factory.mktemp("cli"), retraining={"recorded_order_seed": 0})
    result = cli.invoke(app, ["run", str(config)])
    assert result.exit_code == 0, result.output
    return config.parent / "run", result.output


def test_run_prints_findings_and_the_path_of_the_report(finished):
    _, output = finished
    assert "report.html" in output.replace("\n", "")
    assert "nats" in output


def test_a_run_with_chains_and_labels_has_a_map_of_its_samples(finished):
    assert (finished[0] / "figures" / "map.svg").exists()


def test_report_is_written_again_without_the_task(finished, tmp_path):
    folder, _ = finished
    (folder / "report.html").unlink()
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert cli.invoke(app, ["report", str(folder)]).exit_code == 0
    assert settings["title"] in (folder / "report.html").read_text()


def test_samples_that_matter_are_exported_as_lines_and_a_folder_without_a_run_is_a_line_too(finished, tmp_path):
    path = tmp_path / "attributions.jsonl"
    result = cli.invoke(app, ["export", str(finished[0]), "--jsonl", str(path)])
    assert result.exit_code == 0, result.output
    records = sw.read_jsonl(path)
    assert result.output == f"{len(records)} lines: {path}\n"
    assert {record["step"] for record in records} <= {5, 20, 40}
    assert all(record["proponents"] or record["opponents"] for record in records)
    assert cli.invoke(app, ["export", str(tmp_path), "--jsonl", str(path)]).exit_code == 1


def test_doctor_shows_a_verdict_per_checkpoint(finished):
    result = cli.invoke(app, ["doctor", str(finished[0])])
    assert result.exit_code == 0
    for step in (5, 20, 40):
        assert str(step) in result.output
    assert "exact: r / slope" in result.output


def test_dry_run_predicts_cost_and_samples_nothing(tmp_path):
    config = write_run(tmp_path)
    result = cli.invoke(app, ["run", str(config), "--dry-run"])
    assert result.exit_code == 0, result.output
    for word in ("time", "memory", "disk", "16 cells"):
        assert word in result.output
    assert "slice " not in result.output
    jobs = ["--cells", "2/3", "--executor", "slurm", "-s", "executor.jobs=2", "-s", "workers=null"]
    result = cli.invoke(app, ["run", str(config), "--dry-run", *jobs])
    assert result.exit_code == 0, result.output
    assert "2 worker(s) in 2 job(s) of Slurm" in result.output
    assert "slice   2/3: 5 cells" in result.output
    assert not (tmp_path / "run").exists()


def test_a_run_without_chains_is_a_report_of_exact_influence_and_writes_no_traces(tmp_path):
    config = write_run(tmp_path, estimators=["exact", "gradient"])
    priced = cli.invoke(app, ["run", str(config), "--dry-run"])
    assert "sampling\n" not in priced.output
    assert "exact influence" in priced.output
    result = cli.invoke(app, ["run", str(config)])
    assert result.exit_code == 0, result.output
    assert "3 of 3 checkpoints are answered exactly" in result.output
    assert "No checkpoint has been sampled" in result.output
    assert not list((tmp_path / "run" / "cells").glob("*"))
    assert (tmp_path / "run" / "figures" / "influence.svg").exists()
    again = cli.invoke(app, ["report", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output
    checked = cli.invoke(app, ["doctor", str(tmp_path / "run")])
    assert checked.exit_code == 2
    assert "run the sampling first" in checked.output


def test_faults_end_with_a_message_and_no_traceback(tmp_path):
    result = cli.invoke(app, ["run", str(tmp_path / "absent.yaml")])
    assert result.exit_code == 1
    assert "cannot read the configuration" in result.output
    assert "Traceback" not in result.output


def test_unwritable_run_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = write_run(tmp_path, out="file/run")
    result = cli.invoke(app, ["run", str(config)])
    assert result.exit_code == 1
    assert "file" in result.output


def test_doctor_on_a_folder_that_is_no_run_says_so(tmp_path):
    result = cli.invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2
    assert "no run folder" in result.output


def test_config_says_what_the_default_is_where_it_is_a_new_object_each_time():
    shown = cli.invoke(app, ["config"]).output
    assert "object at" not in shown
    assert "(default {})" in shown.split("options:")[1].splitlines()[0]


def test_config_lists_every_setting_with_its_meaning():
    result = cli.invoke(app, ["config"])
    assert result.exit_code == 0
    for key in ("posterior", "window", "draws", "retraining", "workers"):
        assert key in result.output


def test_data_without_labels_are_studied_sample_by_sample(tmp_path):
    config = write_run(tmp_path, task_args={"labelled": False}, retraining=None)
    result = cli.invoke(app, ["run", str(config)])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "one" in page
    assert "two" in page


def test_doctor_ends_with_1_where_the_chains_of_a_checkpoint_cannot_be_trusted(tmp_path):
    config = write_run(tmp_path, sampling={"chains": 4, "draws": 4}, estimators=["bif"], retraining=None)
    assert cli.invoke(app, ["run", str(config)]).exit_code == 0
    result = cli.invoke(app, ["doctor", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "too few draws" in result.output


def test_doctor_ends_with_0_where_there_is_but_a_word_of_caution(finished, monkeypatch):
    monkeypatch.setattr("stagewise.traces.verdicts.MAX_EVEN_SHARE", -1.0)
    result = cli.invoke(app, ["doctor", str(finished[0])])
    assert result.exit_code == 0
    assert "beyond first order" in result.output


def test_doctor_says_in_its_help_what_its_exit_codes_mean():
    text = " ".join(cli.invoke(app, ["doctor", "--help"]).output.split())
    assert all(f"{code}:" in text for code in (1, 2))
    assert "Exit code 0" in text
    assert cli.invoke(app, ["doctor"]).exit_code == 2


def test_rankings_of_chains_that_are_not_trusted_any_more_are_withheld_with_the_reason_unless_forced(
    tmp_path, monkeypatch
):
    config = write_run(tmp_path, estimators=["bif"], retraining=None, per="sample")
    assert cli.invoke(app, ["run", str(config)]).exit_code == 0
    folder, path = tmp_path / "run", tmp_path / "a.jsonl"
    before = sw.report(folder)
    assert before.exemplars
    assert before.single["BIF"].sizes["step"] == 3
    assert not before.withheld
    monkeypatch.setattr("stagewise.traces.verdicts.MAX_RHAT", 0.0)  # as a later version may judge more strictly
    after = sw.report(folder)
    assert not after.exemplars
    assert "BIF" not in after.single
    assert {*after.withheld} == {exemplar.step for exemplar in before.exemplars}
    page = (folder / "report.html").read_text()
    assert "Chains that cannot be trusted pick no samples" in page
    assert "Training samples that mattered most for" not in page
    result = cli.invoke(app, ["export", str(folder), "--jsonl", str(path)])
    assert "withheld: not converged: " in result.output
    for record in sw.read_jsonl(path):
        assert record["untrusted"].startswith("not converged: ")
        assert record["proponents"] == record["opponents"] == []
    forced = cli.invoke(app, ["export", str(folder), "--jsonl", str(path), "--untrusted"])
    assert "not to be trusted: not converged: " in forced.output
    assert all(r["untrusted"] and (r["proponents"] or r["opponents"]) for r in sw.read_jsonl(path))


def test_rankings_by_exact_influence_are_shown_whatever_the_chains_are(finished, monkeypatch, tmp_path):
    monkeypatch.setattr("stagewise.traces.verdicts.MAX_RHAT", 0.0)
    path = tmp_path / "a.jsonl"
    assert cli.invoke(app, ["export", str(finished[0]), "--jsonl", str(path)]).exit_code == 0
    assert all("untrusted" not in r and (r["proponents"] or r["opponents"]) for r in sw.read_jsonl(path))
