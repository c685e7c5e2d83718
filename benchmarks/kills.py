"""A run that is killed fifty times ends with the same bits as one that is left alone.

    python benchmarks/kills.py [SEED]

Random moments in all stages of a small `stagewise run`: SIGKILL, SIGTERM and SIGINT (to all its processes, as Ctrl-C
in a terminal does) in turn. After each kill no process may be left, and what was complete must not be done again.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from stranger_models import STRANGERS
from strangers import train, write

NAME = "GroupNorm, clipping"
CHECKPOINTS = (20, 28, 36, 44, 52)
KILLS = {"start": 4, "sampling": 18, "baselines": 9, "retraining": 14, "report": 5}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 20.0  # seconds until all processes have ended
console = Console(width=120)


@dataclass(frozen=True)
class Moment:
    """When to kill: some seconds after so many files were written, in a stage, and before there is another."""

    stage: str
    files: int
    delay: float


@dataclass(frozen=True)
class Killed:
    """What a kill left behind."""

    code: int
    complete: int
    nobody_left: bool
    seconds: float


def prepare(folder: Path) -> Path:
    """A run of all stages: checkpoints and configuration."""
    folder.mkdir()
    stranger = STRANGERS[NAME]
    train(stranger, folder / "checkpoints", CHECKPOINTS)
    config = write(NAME, stranger, folder)
    content = yaml.safe_load(config.read_text())
    content |= {
        "sampling": {"chains": 8, "draws": 64, "blocks": 2},
        "retraining": {"weight": 0.8, "repeats": 4},
        "workers": 2,
    }
    config.write_text(yaml.safe_dump(content))
    return config


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        command = [sys.executable, "-m", "stagewise.cli", "run", str(config)]
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def complete(run: Path) -> dict[Path, float]:
    """When every cell and every kept result was written."""
    files = [path for part in ("cells", "kept") for path in (run / part).glob("[!.]*")]
    return {path: path.stat().st_mtime for path in files}


def contents(run: Path) -> dict[str, str]:
    """Hash of every file that holds numbers."""
    files = [path for part in ("cells", "kept", "results") for path in (run / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shown(run: Path, since: float) -> dict[Path, float]:
    """When every file of results and report was written, of those that were since then."""
    files = [*(run / "results").glob("*"), *(run / "figures").glob("*"), run / "report.html"]
    times = {path: path.stat().st_mtime for path in files if path.exists()}
    return {path: when for path, when in times.items() if when >= since}


def stage_of(path: Path) -> str:
    if path.parent.name != "cells" and path.parent.name != "kept":
        return "report"
    if path.parent.name == "cells":
        return "sampling"
    return "retraining" if path.name.startswith(("retraining", "replay")) else "baselines"


def moments(run: Path, began: float, chance: random.Random) -> list[Moment]:
    """Random moments of every stage, by the times of a run that was left alone."""
    files = complete(run) | shown(run, began)
    times = sorted(files.values())
    work = (run / "provenance.json").stat().st_mtime
    ends = {stage: max(t for path, t in files.items() if stage_of(path) == stage) for stage in list(KILLS)[1:]}
    edges = [began, work, *ends.values()]
    chosen = []
    for (stage, kills), first, last in zip(KILLS.items(), edges[:-1], edges[1:], strict=True):
        for moment in sorted(chance.uniform(first, last) for _ in range(kills)):
            done = [t for t in times if t <= moment]
            chosen.append(Moment(stage, len(done), moment - max([first if stage == "start" else work, *done])))
    return chosen


def wait_for(moment: Moment, process: subprocess.Popen[bytes], run: Path) -> None:
    """Until the moment has come, or the process has ended."""
    since, before = time.time(), _written(run)

    def written() -> int:
        return len(complete(run)) + len(shown(run, since))

    def working() -> bool:
        return _written(run) != before  # what is done already is looked at before the work goes on

    while moment.stage != "start" and not (working() and written() >= moment.files):
        if process.poll() is not None:
            return
        time.sleep(0.005)
    now, last = written(), time.time() + moment.delay
    while (
        time.time() < last
        and process.poll() is None
        and written() == now
        and (moment.stage != "start" or not working())
    ):
        time.sleep(0.005)


def _written(run: Path) -> float:
    path = run / "provenance.json"
    return path.stat().st_mtime if path.exists() else 0.0


def kill(process: subprocess.Popen[bytes], how: signal.Signals, run: Path) -> Killed:
    with suppress(ProcessLookupError):  # it has just ended
        (os.killpg if how is signal.SIGINT else os.kill)(process.pid, how)
    since = time.monotonic()
    code = process.wait()
    while (left := alive(process.pid)) and time.monotonic() - since < PATIENCE:
        time.sleep(0.05)
    return Killed(code, len(complete(run)), not left, time.monotonic() - since)


def alive(group: int) -> bool:
    """Whether a process of the group still runs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of) == group and state != "Z":
            return True
    return False


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and by all that is started
    chance = random.Random(int(sys.argv[1]) if sys.argv[1:] else 0)
    with tempfile.TemporaryDirectory() as temporary:
        return compare(Path(temporary), chance)


def compare(folder: Path, chance: random.Random) -> int:
    whole, config, log = prepare(folder / "whole"), prepare(folder / "killed"), folder / "output.txt"
    began = time.time()
    if start(whole, log).wait() != 0:
        console.print(log.read_text(), markup=False)
        return 1
    alone, run = whole.parent / "run", config.parent / "run"
    faults: list[str] = []
    table = Table("kill", "stage", "signal", "exit", "complete", "nobody left", "seconds", "done again")
    for number, moment in enumerate(moments(alone, began, chance)):
        how, before = SIGNALS[number % len(SIGNALS)], complete(run)
        process = start(config, log)
        wait_for(moment, process, run)
        killed = kill(process, how, run)
        again = [path.name for path, when in complete(run).items() if before.get(path, when) != when]
        lost = [path.name for path in before if not path.exists()]
        faults += [f"kill {number}: {what}" for what in judged(killed, again, lost)]
        console.print(f"{number + 1}/{sum(KILLS.values())} {moment.stage}, {how.name}: {killed.code}", highlight=False)
        row = (str(number + 1), moment.stage, how.name, str(killed.code), str(killed.complete), str(killed.nobody_left))
        table.add_row(*row, f"{killed.seconds:.1f}", str(len(again)))
        config = run / "config.yaml" if (run / "config.yaml").exists() else config
    before = complete(run)
    code = start(config, log).wait()
    faults += [f"the last run ended with {code}"] * (code != 0)
    faults += ["the last run did something again"] * any(
        complete(run).get(path) != when for path, when in before.items()
    )
    ours, theirs = contents(run), contents(alone)
    faults += [f"differs: {name}" for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)]
    faults += [f"left over: {path.name}" for path in (run / "cells").glob(".*")]
    faults += ["no report"] * (not (run / "report.html").exists())
    console.print(table)
    console.print(f"{len(theirs)} files compared, {len(faults)} faults")
    for fault in faults:
        console.print(f"- {fault}", style="red", markup=False)
    if faults:
        console.print(log.read_text()[-2000:], markup=False)
    return min(len(faults), 1)


def judged(killed: Killed, again: list[str], lost: list[str]) -> list[str]:
    """What is wrong after a kill."""
    faults = [f"{name} was done again" for name in again] + [f"{name} was lost" for name in lost]
    faults += ["a process is left"] * (not killed.nobody_left)
    return faults + ["the run ended before it"] * (killed.code == 0)


if __name__ == "__main__":
    sys.exit(main())
