"""Setups for executors that know nothing of influence: a cell is a number, and complete once its file is there."""

import multiprocessing
import os
import signal
import time
from pathlib import Path


class Toy:
    """Writes the number of the process into a file for every cell; the third has a fault."""

    def __init__(self, root: Path, fault: str = "none") -> None:
        self.root, self.fault = root, fault

    def __call__(self):
        if self.fault == "setup":
            raise ValueError("no such data")
        return self.compute

    def compute(self, cell: int) -> None:
        if cell == 3:
            self.fail()
        with (self.root / f"cell-{cell}").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def fail(self):
        first = not (self.root / "tried").exists()
        with (self.root / "tried").open("a") as file:
            file.write("once\n")
        if self.fault == "killed" or (self.fault == "killed once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "exit":
            os._exit(7)
        if self.fault == "time limit once" and first:  # what Slurm sends to the job
            os.kill(multiprocessing.parent_process().pid, signal.SIGUSR2)
            time.sleep(60)
        if self.fault == "error" or (self.fault == "error once" and first):
            raise RuntimeError("three is bad")
        if self.fault == "refused":
            raise ValueError("three is refused")


class NoModule:
    """Cannot be read in another process."""

    def __reduce__(self):
        return __import__, ("no_such_module_anywhere",)


class Nothing:
    """Every cell dies, as where the model does not fit into memory."""

    def __call__(self):
        return lambda cell: os.kill(os.getpid(), signal.SIGKILL)


def written(root: Path) -> dict[int, int]:
    """How often each cell was computed."""
    return {int(file.name.split("-")[1]): len(file.read_text().split()) for file in root.glob("cell-*")}
