"""The example that strangers copy works exactly as its README says."""

import re
import runpy
import shutil
from pathlib import Path

from typer.testing import CliRunner

from stagewise.cli import app

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"
# Less of everything than the example has: what is looked at is that the lines work.
SETTINGS = "sampling.chains=4 sampling.draws=32 retraining.repeats=1 workers=1 steps=[10,300]"
LESS = [part for setting in SETTINGS.split() for part in ("-s", setting)]


def commands(readme: Path) -> list[str]:
    """The lines of the README's shell block."""
    block = re.search(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL)
    return block[1].strip().splitlines()


def output(command: str, capsys) -> str:
    """What a line prints, in this process: most of the time of a small one goes into starting."""
    program, *arguments = command.split()
    if program == "python":
        runpy.run_path(arguments[0], run_name="__main__")
        return capsys.readouterr().out
    assert program == "stagewise"
    result = CliRunner().invoke(app, arguments + LESS * (arguments[0] == "run"))
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


def test_the_examples_readme_works_line_by_line(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "own_model"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("checkpoints", "runs", "__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    trained, dry_run, findings, doctor = [output(line, capsys) for line in commands(folder / "README.md")]
    assert "loss" in trained
    assert "disk" in dry_run
    assert "retraining measured" in findings
    assert "verdict" in doctor
    page = (folder / "runs" / "shapes" / "report.html").read_text()
    assert "Discs, rings, squares and crosses" in page
    for shape in ("disc", "ring", "square", "cross"):
        assert shape in page
