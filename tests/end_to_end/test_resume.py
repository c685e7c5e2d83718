"""A run that is killed at random moments ends with the same bits as one that was left alone."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_run

from stagewise.run.config import load_config
from stagewise.run.pipeline import run

_DRIVER = """
import sys
from tiny import without_files_for_papers
from stagewise.run.config import load_config
from stagewise.run.pipeline import run
without_files_for_papers()
run(load_config(sys.argv[1]), lambda what, done, total: print(what, done, flush=True))
"""


def cell_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in (folder / "cells").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_resumes_to_the_same_bits(tmp_path, workers):
    moments = random.Random(workers)
    kept = write_run(tmp_path / "whole", workers=1)
    run(load_config(kept))
    config = write_run(tmp_path / "killed", workers=workers)
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER, str(config)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        )
        lines = moments.randint(2, 3) if kills < workers else 10**9
        for number, _ in enumerate(process.stdout, start=1):
            if number == lines:
                os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 1
    assert cell_hashes(tmp_path / "killed" / "run") == cell_hashes(tmp_path / "whole" / "run")
    assert not list((tmp_path / "killed" / "run" / "cells").glob(".*"))
    assert (tmp_path / "killed" / "run" / "report.html").exists()
