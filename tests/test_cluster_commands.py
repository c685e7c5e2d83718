"""The commands of the guide to clusters do what it says, as far as one machine can tell.

The shell says what each line is once its variables are put in; `stagewise` itself then runs in this process.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from end_to_end.tiny import write_run
from stagewise.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "how_to" / "clusters.md").read_text(encoding="utf-8")
SLURM, ARRAY = "#SBATCH", "SLURM_ARRAY_TASK_ID"
SAY = 'stagewise() { printf "%q " "$@"; echo; }'


def blocks(section=None):
    """The shell blocks of the page, or of a section of it."""
    text = PAGE if section is None else PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def scripts():
    return [block for block in blocks() if SLURM in block]


@pytest.fixture
def here(tmp_path, monkeypatch, no_pictures):
    """A folder with a run to compute, short of all that is not needed to see that it was computed."""
    write_run(tmp_path, estimators=["exact", "gradient"], retraining=None, exemplars=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def carried_out(block, **environment):
    """What the commands of a shell block print, with the exit code of each."""
    said = subprocess.run(
        ["bash", "-euc", f"{SAY}\n{block}"], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    outcomes = []
    for line in said.stdout.splitlines():
        result = CliRunner().invoke(app, arguments := shlex.split(line))
        assert result.exit_code == 0 or arguments[0] == "status", f"{line}\n{result.output}"
        outcomes.append((result.exit_code, result.output))
    assert outcomes, f"no command in:\n{block}"
    return outcomes


def reported(folder):
    return (folder / "report.html").exists() and not list((folder / "failed").glob("*"))


def test_several_processes_compute_the_run(here):
    carried_out(*blocks("Several processes here"))
    assert reported(here / "run")


def test_slices_of_one_folder_and_of_two_are_merged_into_the_same_results(here):
    one, *arrays, two = blocks("Slices in any array job")
    assert all(SLURM in script for script in arrays)
    *_, before, _, after = carried_out(one)
    assert before[0] == 1
    assert "all cells are complete" in before[1]
    assert after[0] == 0
    carried_out(two)
    sliced, merged = here / "runs" / "sliced", here / "runs" / "here"
    assert reported(sliced)
    assert reported(merged)
    found, same = ({f.name: f.read_bytes() for f in (run / "kept").glob("*")} for run in (sliced, merged))
    assert found == same
    assert len(found) == 6 + 3  # results, and numbers of the task at every step


def test_job_scripts_are_shell_and_their_slices_are_all_there_are():
    for script in scripts():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (array,) = (script for script in scripts() if "--cells" in script)
    first, last = re.search(r"--array=(\d+)-(\d+)", array).groups()
    assert (first, last) == ("1", re.search(r"/(\d+)\n", array)[1])


def test_job_scripts_compute_slices_and_merge_them(here):
    array, merge, many = scripts()
    fewer = array.replace("ID/16", "ID/2").replace("workers=4", "workers=1")
    for number in ("1", "2"):
        carried_out(fewer, **{ARRAY: number})
    carried_out(merge)
    assert reported(here / "runs" / "array")
    ((_, settings),) = carried_out(many.replace("stagewise run", "stagewise config"), **{ARRAY: "3"})
    assert "window: 5" in settings
    assert "runs/window-3" in settings


def test_jobs_of_submitit_that_are_processes_here_compute_the_run(here):
    pytest.importorskip("submitit")
    carried_out(*blocks("Slurm"))
    assert reported(here / "runs" / "slurm")
    assert list((here / "runs" / "slurm" / "executor" / "slurm").glob("*")), "no job was submitted"


def test_a_cluster_of_ray_with_a_token_computes_the_run(here):
    pytest.importorskip("ray")
    start, run = blocks("Ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        assert "--port=6379" in start
        start = start.replace("--port=6379", f"--port={port} --include-dashboard=false --temp-dir={folder}")
        environment = {"HOME": str(here), "RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_USAGE_STATS_ENABLED": "0"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        script = f'stagewise() {{ {sys.executable} -m stagewise.cli "$@"; }}\n{start}\n{run}'
        output = here / "told.txt"
        with output.open("w") as told:
            given = os.environ | environment | {"PATH": path}
            shell = subprocess.Popen(
                ["bash", "-euc", script], env=given, stdout=told, stderr=told, start_new_session=True
            )
        try:
            code = shell.wait(timeout=200)
        finally:  # and not by `ray stop`, which ends the clusters of others too
            os.killpg(shell.pid, signal.SIGKILL)
        assert code == 0, output.read_text()
        assert "Token authentication is disabled" not in output.read_text()
        assert (here / ".ray" / "auth_token").exists()
    assert reported(here / "runs" / "ray")
