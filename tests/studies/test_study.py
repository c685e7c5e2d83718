"""The study as a whole: its page, its table of checks, its folder, and the command that runs it."""

import ast
import json
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import stagewise.studies.hierarchy as hierarchy
from stagewise.cli import app
from stagewise.influence.bif import bif
from stagewise.reporting.page import Section
from stagewise.reporting.tables import Table
from stagewise.run import work
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.hierarchy import cost as cost_module
from stagewise.studies.hierarchy import study as study_module
from stagewise.studies.hierarchy.cost import cost
from stagewise.studies.hierarchy.experiments.learning import learning
from stagewise.studies.hierarchy.lab import INSTANT_GAMMA
from stagewise.studies.hierarchy.network import optimizer, record, task
from stagewise.studies.hierarchy.settings import FULL, LAST, RATE, REDUCED, Settings
from stagewise.studies.hierarchy.study import study
from stagewise.studies.hierarchy.theory.tree import KINGDOMS, Items
from stagewise.studies.page import checks_table, claims_table
from stagewise.traces.store import RunMismatchError

cli = CliRunner()
TINY = replace(REDUCED, checkpoints=3, chains=4, draws=8)
HOSTILE = "<script>alert('&')</script>"


@cache
def run_to(*steps):
    """A run that ends where the last checkpoint is; the same for all studies of these steps."""
    items = Items.of(KINGDOMS)
    return record(task(items), optimizer(items, "sgd", RATE), steps[-1], steps)


def sampling(lab):
    """Samples, as most experiments do, and says what came out."""
    traces = lab.sample(run_to(*lab.steps), lab.posterior(INSTANT_GAMMA), f"gamma {INSTANT_GAMMA:g}")
    influence = bif(traces, trusted_only=False)
    check = Check.reported("steps sampled", influence["step"].values, ".0f")
    return Experiment(Section("Sampled", []), [f"mean {float(influence['value'].mean()):.9g}"], [check])


def hostile(lab):
    checks = [Check.at_least(HOSTILE, 0.5, 0.9), Check.at_most("fine", 1e-7, 1e-6, ".0e"), Check.reported(HOSTILE, 2)]
    section = Section(HOSTILE, [Table(HOSTILE, [HOSTILE], [[HOSTILE]], frozenset())])
    return Experiment(section, [HOSTILE], checks, [Claim(HOSTILE, "no & never")])


def tiny(folder, *experiments, **changes):
    """The study of a few experiments on a tiny lab."""
    return study(folder, settings=replace(TINY, **changes), experiments=experiments)


@pytest.fixture
def tiny_command(monkeypatch):
    """The command line's study is a tiny one."""
    monkeypatch.setattr(study_module, "study", partial(study, settings=TINY))
    monkeypatch.setattr(study_module, "EXPERIMENTS", (sampling,))
    monkeypatch.setattr(cost_module, "cost", partial(cost, settings=TINY))


def cells(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / f"gamma-{INSTANT_GAMMA:g}" / "cells").iterdir()}


@pytest.fixture(autouse=True)
def in_a_hurry(no_pictures):
    pass


def test_study_writes_every_part_of_its_page_and_all_checks_as_data(tmp_path):
    told = []
    parts = study(tmp_path, lambda *now: told.append(now), TINY, (learning, sampling))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("Stages of learning", "Sampled", "What is claimed", "2 of 2 targets are reached", "120, 560, 1000"):
        assert text in page
    for part in parts:
        assert part.findings[0] in page
    checks = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))
    assert [check["reached"] for check in checks] == [True, True, None, None]
    assert checks[-1] == {"what": "steps sampled", "values": [120, 560, 1000], "reached": None}
    assert [check["what"] for check in checks] == [c.what for part in parts for c in part.checks]
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg", ".png", ".pdf"}
    assert [now for now in told if now[0] == "experiments"] == [("experiments", 1, 2), ("experiments", 2, 2)]
    assert ("sampling: gamma 1000", 3, 3) in told


def test_text_of_experiments_cannot_break_the_page(tmp_path):
    tiny(tmp_path, hostile)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    # the section's title, the finding, two checks, a claim, and the table's title, header and cell
    assert page.count("&lt;script&gt;alert") >= 8
    assert "no &amp; never" in page


def test_study_that_ran_is_not_sampled_again_and_finds_the_same(tmp_path, monkeypatch):
    first, before = tiny(tmp_path, sampling), cells(tmp_path)

    def refuse(*_):
        raise AssertionError("sampled again")

    monkeypatch.setattr(work, "sample_block", refuse)
    again = tiny(tmp_path, sampling)
    assert again[0].findings == first[0].findings
    assert cells(tmp_path) == before
    assert len(before) == 3


def test_killed_study_samples_only_what_is_missing(tmp_path, monkeypatch):
    done, real = [], work.sample_block

    def killed(*args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(args)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(work, "sample_block", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path, sampling)
    before = cells(tmp_path)
    assert not (tmp_path / "report.html").exists()
    tiny(tmp_path, sampling)
    after = cells(tmp_path)
    assert (len(before), len(after)) == (1, 3)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("other", [{"chains": 5}, {"draws": 9}])
def test_folder_of_a_study_with_other_chains_is_refused_and_kept(tmp_path, other):
    tiny(tmp_path, sampling)
    before, report = cells(tmp_path), (tmp_path / "report.html").read_bytes()
    ((name, number),) = other.items()
    with pytest.raises(RunMismatchError, match=rf"(?s)sampling: differs.*{name}={number}.*another folder") as error:
        tiny(tmp_path, sampling, **other)
    assert str(tmp_path) in str(error.value)
    assert cells(tmp_path) == before
    assert (tmp_path / "report.html").read_bytes() == report


def test_folder_of_a_study_with_other_checkpoints_is_refused_and_named(tmp_path):
    tiny(tmp_path, sampling, checkpoints=4)
    with pytest.raises(ValueError, match=r"traces of other checkpoints \(4 from .*choose another folder"):
        tiny(tmp_path, sampling, checkpoints=7)


def test_folder_of_a_study_that_was_killed_before_it_held_anything_is_used(tmp_path):
    (tmp_path / "gamma-1000").mkdir()
    tiny(tmp_path, sampling, checkpoints=4)


def test_table_of_checks_counts_only_lines_with_a_target():
    table = checks_table([hostile(None), Experiment(Section("", []), [], [])])
    assert table.title.startswith("1 of 2 targets are reached")
    assert table.rows == [
        [HOSTILE, "0.5000", "≥ 0.9", "no"],
        ["fine", "1e-07", "≤ 1e-06", "yes"],
        [HOSTILE, "2.0000", "", ""],
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


@pytest.mark.parametrize(("value", "reached"), [(0.9, True), (1.1, True), (1.11, False), (float("nan"), False)])
def test_near_is_reached_within_the_tolerance_and_never_by_nan(value, reached):
    assert Check.near("slope", value, 1.0, 0.1 + 1e-12).reached is reached


@pytest.mark.parametrize(("interval", "reached"), [((1.2, 1.35), True), ((1.29, 1.35), False), ((1.2, 1.25), False)])
def test_near_with_an_interval_needs_the_centre_inside_of_it_too(interval, reached):
    check = Check.near("flip", 1.3, 1.28, 0.1, ".2f", interval)
    assert check.reached is reached
    assert check.text == f"1.30 [{interval[0]:.2f}, {interval[1]:.2f}]"
    assert check.target_text == "1.28 ± 0.1, in the interval"


@pytest.mark.parametrize(("value", "reached"), [(1.2, True), (1.5, True), (1.19, False), (1.51, False)])
def test_between_is_reached_on_both_ends_and_not_beyond(value, reached):
    check = Check.between("peak", value, 1.2, 1.5, ".1f")
    assert (check.reached, check.target_text) == (reached, "1.2 to 1.5")


def test_numbers_of_a_check_are_written_in_its_form_and_kept_unrounded_as_data():
    check = Check.reported("r", [-0.1234, float("nan"), -1e-9], ".2f", lower=[-1, 0, 0], upper=[0.5, 1, 1])
    assert check.text == "−0.12 [−1.00, 0.50], – [0.00, 1.00], 0.00 [0.00, 1.00]"
    plain = {"values": [-0.1234, None, -1e-9], "lower": [-1, 0, 0], "upper": [0.5, 1, 1]}
    assert check.as_plain() == {"what": "r", **plain, "reached": None}
    with pytest.raises(ValueError, match="'r' has 3 numbers, not one"):
        _ = check.value
    held = Check.at_most("error", 2.0, 1.0).as_plain()
    assert held == {"what": "error", "values": [2], "comparison": "at most", "target": [1], "reached": False}


def test_reduced_study_is_the_full_one_with_less_of_everything_it_changes():
    for name, full in vars(FULL).items():
        reduced = getattr(REDUCED, name)
        sizes = [value if isinstance(value, int) else len(value) for value in (reduced, full)]
        assert sizes[0] <= sizes[1] or name == "adam_sampled_every"


@pytest.mark.parametrize(
    ("inside", "forbidden"),
    [
        ("theory", r"^stagewise\.studies\.hierarchy\.(?!theory\.)"),
        (".", r"^stagewise\.studies\.hierarchy\.experiments"),
    ],
)
def test_imports_go_one_way_from_experiments_over_the_lab_to_theory(inside, forbidden):
    for path in (Path(hierarchy.__file__).parent / inside).glob("*.py"):
        if path.name != "study.py":  # which names the experiments
            imported = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
            assert not [module for module in imported if re.match(forbidden, f"{module}.")], path


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5, 7, 16, 60, 61, 999, 5000])
def test_checkpoints_ascend_without_repeats_within_the_run_for_any_number(checkpoints):
    steps = Settings(checkpoints=checkpoints).steps
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


def test_dry_run_predicts_time_memory_and_disk_and_writes_nothing(tiny_command, tmp_path):
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0, result.output
    for text in ("time ", "memory ", "disk ", "9 cells", "1 worker"):
        assert text in result.output
    assert not list(tmp_path.iterdir())


def test_command_prints_the_findings_and_where_the_report_is(tiny_command, tmp_path):
    (finding,) = tiny(tmp_path / "hierarchy", sampling)[0].findings
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert finding in result.output
    assert str(tmp_path / "hierarchy" / "report.html") in result.output
    assert (tmp_path / "hierarchy" / "checks.json").exists()


def test_folder_of_another_study_ends_the_command_with_a_message_and_no_traceback(tiny_command, tmp_path):
    tiny(tmp_path / "hierarchy", sampling, draws=9)
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds another run" in result.output
    assert "Traceback" not in result.output


def test_file_in_the_place_of_the_folder_is_named(tiny_command, tmp_path):
    (tmp_path / "file").write_text("")
    result = cli.invoke(app, ["study", "hierarchy", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "error: " in result.output
    assert str(tmp_path / "file") in result.output
