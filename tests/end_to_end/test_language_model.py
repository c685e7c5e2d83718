"""The example of a language model works as its README says, and its answers are those of retraining."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

from stagewise.cli import app

EXAMPLE = Path(__file__).parents[2] / "examples" / "language_model"
# Less of everything than the example has: what is looked at is that the lines work.
LESS = ["-s", "steps=[4,14]", "-s", "posterior.window=2", "-s", "workers=1"]
SIZES = {"slice(0, 600), slice(600, 660)": "slice(0, 40), slice(40, 50)", "32, 400, 200": "32, 400, 20"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    copy = tmp_path / "language_model"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("checkpoints", "runs", "trainer", "__pycache__"))
    text = (copy / "text.py").read_text()
    for size, less in SIZES.items():
        assert size in text
        text = text.replace(size, less)
    (copy / "text.py").write_text(text)
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(copy)
    yield copy
    sys.modules.pop("text", None)


def test_the_examples_readme_works_line_by_line(folder, no_pictures):
    install, train, *lines = re.search(r"```sh\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1].split("\n")
    assert install == "pip install 'stagewise[hf]'"
    assert train == "python train.py"
    runpy.run_path("train.py", run_name="__main__")
    shown = []
    for line in filter(None, lines):
        result = CliRunner().invoke(app, [*line.split()[1:], *LESS])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        shown.append(result.output)
    assert "exact influence" in shown[0]
    found = re.search(r"correlate with a median of ([\d.]+)", shown[1])
    assert float(found[1]) > 0.95
    assert "misses at most" in shown[1]
    page = (folder / "runs" / "text" / "report.html").read_text()
    assert "Kinds of tokens in Python code" in page
    assert "word start" in page
    assert re.search(r'<span style="background:#[0-9a-f]{6}(;color:#fff)?" title="(helpful|harmful): ', page)
