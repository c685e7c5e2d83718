"""The example that strangers copy works exactly as its README says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"


def commands(readme: Path) -> list[str]:
    """The lines of the README's shell block."""
    block = re.search(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL)
    return block[1].strip().splitlines()


def test_the_examples_readme_works_line_by_line(tmp_path):
    folder = tmp_path / "own_model"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("checkpoints", "runs", "__pycache__"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outputs = []
    for command in commands(folder / "README.md"):
        result = subprocess.run(
            command.split(),
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        outputs.append(result.stdout)
    trained, dry_run, findings, doctor = outputs
    assert "loss" in trained
    assert "disk" in dry_run
    assert "retraining measured" in findings
    assert "verdict" in doctor
    page = (folder / "runs" / "shapes" / "report.html").read_text()
    assert "Discs, rings, squares and crosses" in page
    for shape in ("disc", "ring", "square", "cross"):
        assert shape in page
