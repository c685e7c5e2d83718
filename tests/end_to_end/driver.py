"""A run in a process of its own, which ends itself at a given moment."""

import os
import signal
from pathlib import Path

from hurried import without_pictures
from stagewise.run.config import load_config
from stagewise.run.pipeline import run


def drive(config: Path, moment: str, how: signal.Signals | None) -> None:
    os.setsid()  # its workers can be known by its group
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    without_pictures()

    def progress(what, done, total):
        if f"{what} {done}" == moment:
            os.kill(os.getpid(), how)

    run(load_config(config), progress)
