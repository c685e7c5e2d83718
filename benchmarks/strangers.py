"""Models that stagewise has never seen, put through `stagewise run` from training to report.

    python benchmarks/strangers.py [PART OF A NAME ...]

Each is trained by a plain loop with a `Recorder`, as the README shows it, and studied with default settings, but for
few chains, draws and checkpoints. It prints what every run answered and left out, and fails if one has no report.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from stranger_models import OPTIMIZERS, STRANGERS, TRAIN, Stranger, batch_at, mean_of
from typer.testing import CliRunner

import stagewise as sw
from stagewise.cli import app
from stagewise.reporting import files

UPDATES, BATCH, WINDOW = 60, 12, 4
CHECKPOINTS = (20, 40, 52)
# As a person would: in a process of its own. The others are called in this one, which saves the time of starting.
IN_A_PROCESS = ("LSTM", "torch.compile", "GPT-2")
WIDE = {"COLUMNS": "1000"}  # a sentence is a line
console = Console(width=200)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    seconds: float
    answered: str
    left_out: list[str]
    has_report: bool


class NoFile:
    """A canvas that writes nothing: figures for papers take most of the time, and are no business of the model's."""

    def __init__(self, _figure: object) -> None:
        pass

    def print_pdf(self, path: Path, **_settings: object) -> None:
        path.touch()

    print_png = print_pdf


def train(stranger: Stranger, folder: Path, checkpoints: Sequence[int] = CHECKPOINTS) -> None:
    """The stranger's training loop; the two lines that mention the recorder are all that stagewise adds."""
    torch.manual_seed(0)
    model, data = stranger.built(), stranger.data(TRAIN, 1)
    model.train(stranger.train_mode)
    optimizer = OPTIMIZERS[stranger.optimizer](p for p in model.parameters() if p.requires_grad)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, UPDATES + 1) if stranger.one_cycle else None
    recorder = sw.Recorder(folder, model, optimizer, checkpoints, batch_size=BATCH, clip_norm=stranger.clip)
    for step in range(1, UPDATES + 1):
        optimizer.zero_grad()
        for rows in torch.randperm(TRAIN)[:BATCH].chunk(stranger.accumulate):
            batch = batch_at(data, rows.tolist(), stranger.task.get("collate"))
            (mean_of(stranger.loss(model, batch)) / stranger.accumulate).backward()
        if stranger.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), stranger.clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
        recorder(step)


def write(name: str, stranger: Stranger, folder: Path) -> Path:
    """The stranger's task file and configuration."""
    here = str(Path(__file__).parent)
    (folder / "my_task.py").write_text(
        f"import sys\nsys.path.insert(0, {here!r})\nfrom stranger_models import STRANGERS\n\n\n"
        f"def task():\n    return STRANGERS[{name!r}].make_task()\n"
    )
    content = {
        "title": name,
        "task": "my_task.py:task",
        "checkpoints": "checkpoints",
        "out": "run",
        "posterior": {"gamma": 100.0} if stranger.weights_alone else {"window": WINDOW},
        "sampling": {"chains": 4, "draws": 24},
        "workers": 1,
    }
    if not stranger.weights_alone:
        content["retraining"] = {"weight": 0.8, "repeats": 1}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def stagewise(config: Path, in_a_process: bool) -> tuple[int, str]:
    """Exit code and output of `stagewise run`."""
    if in_a_process:
        command = [sys.executable, "-m", "stagewise.cli", "run", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | WIDE)
        return done.returncode, done.stdout + done.stderr
    result = CliRunner().invoke(app, ["run", str(config)], env=WIDE)
    crash = result.exception if not isinstance(result.exception, SystemExit) else None
    return result.exit_code, result.output + ("".join(traceback.format_exception(crash)) if crash else "")


def carry_out(name: str, folder: Path) -> Outcome:
    stranger, start = STRANGERS[name], time.perf_counter()
    folder.mkdir()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(stranger, folder / "checkpoints")
    recorder = [f"Recorder: {w.message}" for w in said if w.category is UserWarning and w.filename == __file__]
    code, output = stagewise(write(name, stranger, folder), name in IN_A_PROCESS)
    (folder / "output.txt").write_text(output)
    report = folder / "run" / "report.html"
    if code != 0:
        return Outcome(code, time.perf_counter() - start, "-", [*recorder, output.strip()], report.exists())
    return Outcome(code, time.perf_counter() - start, answered(output), recorder + left_out(output), report.exists())


def answered(output: str) -> str:
    """From "3 of 3 checkpoints can be answered"."""
    found = re.search(r"(\d+) of (\d+) checkpoints? can be answered", output)
    return f"{found[1]} of {found[2]}" if found else "-"


def left_out(output: str) -> list[str]:
    """The sentences on what was left out, or is not to be trusted."""
    telling = ("- Without ", "cannot be answered", "Is it this run", "No prediction", "No checkpoint")
    return [line.removeprefix("- ") for line in output.splitlines() if any(word in line for word in telling)]


def unnamed(folder: Path, outcome: Outcome) -> list[str]:
    """What a run left out and did not say: baselines, retraining, checkpoints."""
    results = folder / "run" / "results"
    said = "\n".join(outcome.left_out)
    wanted = {"baseline gradient product": "gradient product", "baseline damped influence": "damped influence"}
    if "retraining" in yaml.safe_load((folder / "config.yaml").read_text()):
        wanted["measured"] = "retraining"
    there = {path.stem for path in results.glob("*.json")} if results.exists() else set()
    return [part for name, part in wanted.items() if name not in there and f"Without {part}" not in said]


def main() -> int:
    files.FigureCanvasPdf = files.FigureCanvasAgg = NoFile
    wanted = [name for name in STRANGERS if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    table = Table("model", "loss", "optimiser", "exit", "answered", "left out, or said of what is shown", "seconds")
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(wanted):
            stranger, folder = STRANGERS[name], Path(temporary) / str(number)
            outcome = carry_out(name, folder)
            missing = unnamed(folder, outcome) if outcome.code == 0 else []
            fault = outcome.code != 0 or not outcome.has_report or bool(missing)
            faults += fault
            loss = getattr(stranger.loss, "__name__", type(stranger.loss).__name__)
            words = [*(f"NOT NAMED: {part}" for part in missing), *outcome.left_out]
            row = (name, loss, optimiser(stranger), str(outcome.code), outcome.answered, "\n".join(words))
            table.add_row(*row, f"{outcome.seconds:.1f}", style="red" if fault else None)
            console.print(f"{number + 1}/{len(wanted)} {name}: exit {outcome.code}", highlight=False)
    console.print(table)
    console.print(f"{len(wanted) - faults} of {len(wanted)} strangers have a report that says what it left out")
    return min(faults, 1)


def optimiser(stranger: Stranger) -> str:
    """In words."""
    words = [stranger.optimizer]
    words += [f"clip {stranger.clip}"] if stranger.clip else []
    words += ["OneCycle"] if stranger.one_cycle else []
    words += [f"{stranger.accumulate} batches"] if stranger.accumulate > 1 else []
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main())
