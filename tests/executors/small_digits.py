"""The digits study with few checkpoints, chains and draws."""

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

from hurried import without_pictures
from stagewise.run.config import RunConfig
from stagewise.run.pipeline import run, run_slice
from stagewise.run.slices import Slice
from stagewise.sampling.chains import Chains
from stagewise.studies.digits.study import study
from stagewise.studies.digits.training import record

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["stagewise.run.pipeline"])


def recorded(folder: Path) -> RunConfig:
    """The minibatch run, trained for a few updates."""
    record(folder / "minibatch" / "checkpoints", 64, [4, 8, 16])  # in the place of the long one
    config = study(folder)[1]
    return config.model_copy(
        update={"sampling": Chains(chains=2, draws=8, burn_in=4, thinning=1, blocks=2), "workers": 2}
    )


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file that holds numbers."""
    files = [path for part in ("cells", "kept", "results") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def complete(folder: Path) -> dict[Path, int]:
    """When every cell was written."""
    found = {}
    for path in [*(folder / "cells").glob("*.zip"), *(folder / "kept").glob("[!.]*")]:
        found[path] = path.stat().st_mtime_ns
    return found


def until(folder: Path, cells: int, seconds: float = 120) -> dict[Path, int]:
    """Wait until so many cells are complete."""
    end = time.monotonic() + seconds
    while len(found := complete(folder)) < cells:
        assert time.monotonic() < end, f"{len(found)} of {cells} cells after {seconds} s"
        time.sleep(0.02)
    return found


def _drive(config: RunConfig, part: Slice | None, log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)  # it comes from a server that knows nothing of the cluster
    signal.signal(signal.SIGINT, signal.default_int_handler)
    without_pictures()

    def progress(what, done, total):
        with log.open("a") as file:
            file.write(f"{what} {done} {total}\n")

    run(config, progress) if part is None else run_slice(config, part, progress)


def start(config: RunConfig, log: Path, part: Slice | None = None):
    """A driver in a process of its own, with a session of its own."""
    process = processes.Process(target=_drive, args=(config, part, log, dict(os.environ)))
    process.start()
    return process
