"""What a script defines is known to workers that know nothing of the script."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("executor", ["local", "ray", "slurm"])
def test_a_task_of_the_script_itself_sent_or_made_anew_by_it_gives_the_same_bits_everywhere(executor, two_nodes):
    script = Path(__file__).with_name("a_script.py")
    ended = subprocess.run([sys.executable, script, executor], capture_output=True, text=True, timeout=200)
    assert ended.stdout.splitlines()[-1:] == ["[True, True, True]"], ended.stderr
