"""A run in a process of its own, which says how far it is."""

import os
import signal
from pathlib import Path

from hurried import without_pictures
from stagewise.run.config import load_config
from stagewise.run.pipeline import run


def drive(config: Path, teller) -> None:
    os.setsid()  # its workers can be known by its group
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    without_pictures()
    run(load_config(config), lambda what, done, total: teller.send(f"{what} {done}"))
