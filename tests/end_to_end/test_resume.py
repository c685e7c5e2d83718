"""A run that is killed at any stage goes on where it was, ends with the same bits, and leaves no process behind."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import write_run

from stagewise.run.config import load_config
from stagewise.run.pipeline import run

_DRIVER = """
import signal, sys
if __name__ == "__main__":  # its workers, which start with this file too, need none of it
    from tiny import without_files_for_papers
    from stagewise.run.config import load_config
    from stagewise.run.pipeline import run
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    without_files_for_papers()
    run(load_config(sys.argv[1]), lambda what, done, total: print(what, done, flush=True))
"""


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file that holds numbers."""
    files = [path for part in ("cells", "kept", "results") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def complete(folder: Path) -> dict[Path, int]:
    """When every cell and every kept result was written."""
    cells = [path for path in (folder / "cells").glob("*") if not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in [*cells, *(folder / "kept").glob("[!.]*")]}


def start(driver: Path, config: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, driver, config],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"},
    )


def nobody_left(group: int, seconds: float = 20) -> bool:
    """Whether all processes of a group have ended."""
    for _ in range(int(10 * seconds)):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run holds that nobody killed."""
    config = load_config(write_run(tmp_path_factory.mktemp("whole"), workers=1))
    run(config)
    return contents(config.out)


@pytest.mark.parametrize(
    ("workers", "kills"),
    [
        (2, [("sampling 1", signal.SIGTERM), ("sampling 2", signal.SIGKILL)]),
        (1, [("gradient product 2", signal.SIGINT), ("retraining windows 1", signal.SIGKILL)]),
    ],
)
def test_a_killed_run_goes_on_from_its_own_configuration_to_the_same_bits(tmp_path, whole, workers, kills):
    config, folder = write_run(tmp_path / "killed", workers=workers), tmp_path / "killed" / "run"
    driver = tmp_path / "driver.py"
    driver.write_text(_DRIVER)
    done = {}
    for moment, how in [*kills, ("never", None)]:
        process = start(driver, config)
        for line in process.stdout:
            if line.strip() == moment:
                os.kill(process.pid, how)
        process.stdout.close()
        ended = process.wait()
        assert (ended == 0) == (how is None)
        with suppress(ProcessLookupError):
            assert nobody_left(process.pid)
        assert {path: when for path, when in complete(folder).items() if path in done} == done
        done = complete(folder)
        config = folder / "config.yaml"  # is there from the first moment on
    assert contents(folder) == whole
    assert len(done) == 3 + 3 * 3 + 1  # cells; two baselines and retraining of each; whether retraining repeats the run
    assert not list((folder / "cells").glob(".*"))
    assert (folder / "report.html").exists()
