"""A run that is killed at any stage goes on where it was, ends with the same bits, and leaves no process behind."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from driver import drive
from tiny import write_run

from stagewise.run.checkup import checkup
from stagewise.run.config import load_config
from stagewise.run.pipeline import run
from stagewise.traces.store import RunFolderError

# A new process for every run, but all from one that has imported everything: that takes most of the time.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["stagewise.run.pipeline", "arviz_stats", "torch._dynamo", "s3fs"])


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file that holds numbers."""
    files = [path for part in ("cells", "kept", "results") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def complete(folder: Path) -> dict[Path, int]:
    """When every cell and every kept result was written."""
    cells = [path for path in (folder / "cells").glob("*") if not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in [*cells, *(folder / "kept").glob("[!.]*")]}


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
    """The folder of a run that nobody killed."""
    config = load_config(write_run(tmp_path_factory.mktemp("whole"), workers=1))
    run(config)
    return config.out


KILLS = [
    ("sampling 1", signal.SIGTERM),
    ("sampling 2", signal.SIGKILL),
    ("gradient product 2", signal.SIGINT),
    ("retraining windows 1", signal.SIGKILL),
]


def test_a_killed_run_goes_on_from_its_own_configuration_to_the_same_bits(tmp_path, whole):
    config, folder = write_run(tmp_path / "killed", workers=2), tmp_path / "killed" / "run"
    done = {}
    for moment, how in [*KILLS, ("never", None)]:
        process = processes.Process(target=drive, args=(config, moment, how))
        process.start()
        process.join()
        assert (process.exitcode == 0) == (how is None)
        with suppress(ProcessLookupError):
            assert nobody_left(process.pid)
        assert {path: when for path, when in complete(folder).items() if path in done} == done
        done = complete(folder)
        config = folder / "config.yaml"  # is there from the first moment on
    assert contents(folder) == contents(whole)
    # Cells; exact influence of groups and samples, two baselines and retraining of each; whether the run is repeated.
    # And of each step the numbers by which the task is known again.
    assert len(done) == 3 + 5 * 3 + 1 + 3
    assert not list((folder / "cells").glob(".*"))
    assert (folder / "report.html").exists()


def test_a_flipped_byte_of_a_chunk_is_named_and_the_cell_computed_again_once_it_is_deleted(tmp_path, whole):
    folder = tmp_path / "damaged" / "run"
    shutil.copytree(whole.parent, folder.parent)
    cell = sorted((folder / "cells").glob("*.zip"))[1]
    with zipfile.ZipFile(cell) as file:
        chunk = max(file.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(cell.read_bytes())
    content[chunk.header_offset + len(chunk.filename) + chunk.compress_size // 2] ^= 1
    cell.write_bytes(content)
    config = load_config(folder / "config.yaml")
    for look in (lambda: run(config), lambda: checkup(folder)):
        with pytest.raises(RunFolderError, match=f"{cell.name}.*delete it and run again"):
            look()
    cell.unlink()
    (folder / "results").rename(tmp_path / "results before")  # nothing of these is taken over
    run(config)
    assert contents(folder) == contents(whole)
