"""The study as a whole: its page, its table of checks, its folder, and the command that runs it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from stagewise.cli import app
from stagewise.influence.bif import bif
from stagewise.reporting.page import Section
from stagewise.reporting.tables import Table
from stagewise.run import engine
from stagewise.studies.hierarchy import lab as lab_module
from stagewise.studies.hierarchy import study as study_module
from stagewise.studies.hierarchy.lab import INSTANT_GAMMA, LAST, Check, Claim, Experiment, Size
from stagewise.studies.hierarchy.learning import learning
from stagewise.studies.hierarchy.study import checks_table, claims_table, study
from stagewise.traces.store import RunMismatchError

cli = CliRunner()
TINY = Size(checkpoints=3, chains=4, draws=8, workers=1)
HOSTILE = "<script>alert('&')</script>"


def sampling(lab):
    """Samples, as most experiments do, and says what came out."""
    influence = bif(lab.instant_traces, trusted_only=False)
    check = Check("steps sampled", " ".join(map(str, influence["step"].values)))
    return Experiment(Section("Sampled", []), [f"mean {float(influence['value'].mean()):.9g}"], [check])


def hostile(lab):
    checks = [Check.at_least(HOSTILE, 0.5, 0.9), Check.at_most("fine", 1e-7, 1e-6, ".0e"), Check("reported", HOSTILE)]
    section = Section(HOSTILE, [Table(HOSTILE, [HOSTILE], [[HOSTILE]], frozenset())])
    return Experiment(section, [HOSTILE], checks, [Claim(HOSTILE, "no & never")])


@pytest.fixture
def experiments(monkeypatch):
    """Name the experiments of the study."""
    return lambda *chosen: monkeypatch.setattr(study_module, "EXPERIMENTS", chosen)


@pytest.fixture
def tiny(monkeypatch):
    """The command line's study is a small one."""
    monkeypatch.setattr(lab_module, "Size", lambda: TINY)


def cells(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / f"gamma-{INSTANT_GAMMA:g}" / "cells").iterdir()}


def test_study_writes_every_part_of_its_page_and_all_checks_as_data(experiments, tmp_path):
    experiments(learning, sampling)
    told = []
    parts = study(tmp_path, lambda *now: told.append(now), TINY)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("Stages of learning", "Sampled", "What is claimed", "2 of 2 targets are reached", "120 560 1000"):
        assert text in page
    for part in parts:
        assert part.findings[0] in page
    checks = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))
    assert [check["reached"] for check in checks] == [True, True, None]
    assert [check["what"] for check in checks] == [c.what for part in parts for c in part.checks]
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg", ".png", ".pdf"}
    assert [now for now in told if now[0] == "experiments"] == [("experiments", 1, 2), ("experiments", 2, 2)]
    assert ("sampling: gamma 1000", 3, 3) in told


def test_text_of_experiments_cannot_break_the_page(experiments, tmp_path):
    experiments(hostile)
    study(tmp_path, size=TINY)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    # the section's title, the finding, a check, a value, a claim, and the table's title, header and cell
    assert page.count("&lt;script&gt;alert") >= 8
    assert "no &amp; never" in page


def test_study_that_ran_is_not_sampled_again_and_finds_the_same(experiments, tmp_path, monkeypatch):
    experiments(sampling)
    first, before = study(tmp_path, size=TINY), cells(tmp_path)

    def refuse(*_):
        raise AssertionError("sampled again")

    monkeypatch.setattr(engine, "sample_block", refuse)
    again = study(tmp_path, size=TINY)
    assert again[0].findings == first[0].findings
    assert cells(tmp_path) == before
    assert len(before) == 3


def test_killed_study_samples_only_what_is_missing(experiments, tmp_path, monkeypatch):
    experiments(sampling)
    done, real = [], engine.sample_block

    def killed(*args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "sample_block", killed)
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path, size=TINY)
    before = cells(tmp_path)
    assert not (tmp_path / "report.html").exists()
    study(tmp_path, size=TINY)
    after = cells(tmp_path)
    assert (len(before), len(after)) == (1, 3)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("other", [Size(3, 5, 8, 1), Size(3, 4, 9, 1)])
def test_folder_of_a_study_with_other_chains_is_refused_and_kept(experiments, tmp_path, other):
    experiments(sampling)
    study(tmp_path, size=TINY)
    before, report = cells(tmp_path), (tmp_path / "report.html").read_bytes()
    with pytest.raises(RunMismatchError, match=rf"(?s)sampling: differs.*draws={other.draws}.*another folder") as error:
        study(tmp_path, size=other)
    assert str(tmp_path) in str(error.value)
    assert cells(tmp_path) == before
    assert (tmp_path / "report.html").read_bytes() == report


def test_folder_of_a_study_with_other_checkpoints_is_refused_and_named(experiments, tmp_path):
    experiments(sampling)
    study(tmp_path, size=Size(4, 4, 8, 1))
    with pytest.raises(ValueError, match=r"traces of other checkpoints \(4 from .*choose another folder"):
        study(tmp_path, size=Size(7, 4, 8, 1))


def test_folder_of_a_study_that_was_killed_before_it_held_anything_is_used(experiments, tmp_path):
    experiments(sampling)
    (tmp_path / "gamma-1000").mkdir()
    study(tmp_path, size=Size(4, 4, 8, 1))


def test_table_of_checks_counts_only_lines_with_a_target():
    table = checks_table([hostile(None), Experiment(Section("", []), [], [])])
    assert table.title.startswith("1 of 2 targets are reached")
    assert table.rows == [
        [HOSTILE, "0.5000", "≥ 0.9", "no"],
        ["fine", "1e-07", "≤ 1e-06", "yes"],
        ["reported", HOSTILE, "", ""],
    ]
    assert checks_table([]).title.startswith("0 of 0")


def test_table_of_claims_keeps_what_was_said_beside_what_was_found():
    assert claims_table([hostile(None), hostile(None)]).rows == [[HOSTILE, "no & never"]] * 2
    assert claims_table([]).rows == []


@pytest.mark.parametrize(("value", "reached"), [(0.9, True), (0.8999, False), (1.0, True), (float("nan"), False)])
def test_at_least_is_reached_on_its_bound_and_never_by_nan(value, reached):
    assert Check.at_least("r", value, 0.9).reached is reached
    assert Check.at_least("r", np.float32(value), np.float32(0.9)).reached is reached


@pytest.mark.parametrize(("value", "reached"), [(1e-6, True), (1.1e-6, False), (0.0, True), (float("nan"), False)])
def test_at_most_is_reached_on_its_bound_and_never_by_nan(value, reached):
    check = Check.at_most("error", np.float64(value), 1e-6, ".1e")
    assert check.reached is reached
    assert json.dumps(check.reached) in ("true", "false")


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5, 7, 16, 60, 61, 999, 5000])
def test_checkpoints_ascend_without_repeats_within_the_run_for_any_number(checkpoints):
    steps = Size(checkpoints=checkpoints).steps
    assert steps == sorted(set(steps))
    assert 0 < steps[0] <= steps[-1] <= LAST
    assert all(type(step) is int for step in steps)
    assert len(steps) <= checkpoints
    if checkpoints < 1000:
        assert len(steps) == checkpoints
    early = sum(step < LAST / 2 for step in steps)
    assert abs(early - 0.75 * len(steps)) <= 1 or checkpoints == 5000


def test_unknown_study_is_named_with_those_there_are(tmp_path):
    result = cli.invoke(app, ["study", "nonsense", "--out", str(tmp_path)])
    assert result.exit_code == 1
    for text in ("'nonsense'", "digits", "hierarchy"):
        assert text in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_dry_run_predicts_time_memory_and_disk_and_writes_nothing(tiny, tmp_path):
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0, result.output
    for text in ("time ", "memory ", "disk ", "9 cells", "1 worker"):
        assert text in result.output
    assert not list(tmp_path.iterdir())


def test_command_prints_the_findings_and_where_the_report_is(experiments, tiny, tmp_path):
    experiments(learning, sampling)
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "half-way at t = 1.36" in result.output.replace("\n", " ")
    assert str(tmp_path / "hierarchy" / "report.html") in result.output
    assert (tmp_path / "hierarchy" / "checks.json").exists()


def test_folder_of_another_study_ends_the_command_with_a_message_and_no_traceback(experiments, tiny, tmp_path):
    experiments(sampling)
    study(tmp_path / "hierarchy", size=Size(3, 4, 9, 1))
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds another run" in result.output
    assert "Traceback" not in result.output


def test_file_in_the_place_of_the_folder_is_named(experiments, tiny, tmp_path):
    experiments(sampling)
    (tmp_path / "file").write_text("")
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "error: " in result.output
    assert str(tmp_path / "file") in result.output
