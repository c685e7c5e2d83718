"""The page about models larger than one GPU: its script runs by its command."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "sharded.md"


def blocks(kind):
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```", PAGE.read_text(encoding="utf-8"))


def test_the_script_of_the_page_runs_in_two_processes_and_finds_that_repetitions_help(tmp_path):
    [script], [command] = blocks("python"), blocks("sh")
    (tmp_path / "large.py").write_text(script)
    assert command.startswith("torchrun ")
    arguments = [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]]
    ended = subprocess.run(
        arguments, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    exact, drawn = (dict(re.findall(r"(?m)^(repeats|noise) +(\S+)$", part)) for part in ended.stdout.split("Name:")[:2])
    assert float(exact["repeats"]) < 0
    assert drawn.keys() == exact.keys()
    assert (tmp_path / "runs" / "large" / "cells" / "00000020-0000.zip").exists()
