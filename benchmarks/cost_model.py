"""What a dry run predicts against what the same work really takes.

    python benchmarks/cost_model.py            sampling, each number twice
    python benchmarks/cost_model.py --runs     whole runs, by what they are spent on

Sampling with its files, the largest part of most runs, on one thread and one worker. Each number is of a process of its
own: what a process does only once is in it.

seconds     of the processor, which other work on the machine changes little: predicted / measured, and their ratio
peak MiB    of the resident set beyond what the process held before the chains (Linux), against the predicted memory
MiB         of the run folder's cells, against the predicted disk

The rows that are held out are larger than, and other than, those that were looked at while the prediction was written:
they were chosen beforehand, and nothing was changed in the prediction after they had been seen. That of memory was
written later than that of seconds, with the first of them in sight.

Of a whole run of examples/own_model, cells and all else are told apart, in seconds of the processor: of two workers
those of the one that has the most, without the time that a process takes to start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peak import forget_peak, peak
from rich.console import Console
from rich.table import Table
from torch import nn

# Before anything asks for the clock: that of the processor, which other work on the machine changes little.
time.perf_counter = time.process_time

import stagewise as sw  # noqa: E402
from stagewise.retraining.training import train_and_record  # noqa: E402
from stagewise.run import pipeline  # noqa: E402
from stagewise.run.chains_cost import sampling_cost  # noqa: E402
from stagewise.run.config import load_config  # noqa: E402
from stagewise.run.cost import estimate  # noqa: E402
from stagewise.run.crew import Crew  # noqa: E402
from stagewise.run.engine import sample  # noqa: E402
from stagewise.run.progress import silent  # noqa: E402
from stagewise.run.stages import RunWork  # noqa: E402

console = Console(width=130)
CLOSE = 0.25
NOTED = "noted-"
EXAMPLE = Path(__file__).parents[1] / "examples" / "own_model"
LOOKED_AT: dict[str, dict[str, Any]] = {
    "digits, 16 chains, 32 draws": {"chains": 16, "draws": 32},
    "looped": {"chains": 4, "draws": 16, "batching": "loop"},
    "minibatches, sgld": {"chains": 16, "draws": 16, "sampler": "sgld", "batch_size": 256},
    "the window's own draws": {"chains": 16, "draws": 16, "sampler": "window"},
}
SEEN: dict[str, dict[str, Any]] = {
    "a wider network, 24 chains, 100 draws": {"width": 96, "chains": 24, "draws": 100, "checkpoints": 3},
    "12 checkpoints, linear": {"chains": 8, "draws": 24, "checkpoints": 12, "linear": True},
    "looped, no reflection, two blocks": {"chains": 6, "draws": 24, "batching": "loop", "reflect": False, "blocks": 2},
    "tokens, without a posterior": {"words": 200, "chains": 4, "draws": 12, "checkpoints": 3},
    "tokens, the window's own draws": {"words": 200, "chains": 4, "draws": 12, "checkpoints": 2, "sampler": "window"},
}
UNSEEN: dict[str, dict[str, Any]] = {
    "300 draws, no reflection": {"chains": 8, "draws": 300, "reflect": False, "checkpoints": 3},
    "minibatches, linear": {"chains": 12, "draws": 80, "batch_size": 256, "linear": True, "checkpoints": 2},
}
GROUPS = {"looked at": LOOKED_AT, "held out from seconds": SEEN, "held out from all": UNSEEN}
HELD_OUT = {"seconds": (SEEN, UNSEEN), "memory": (UNSEEN,)}


def digits(width: int) -> Any:
    from stagewise.studies.digits.training import cross_entropy, task

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).eval()
    of_study = task()
    train, held_out = (data.batch(slice(None)) for data in (of_study.train, of_study.queries["held-out"]))
    return sw.Task(model, cross_entropy, train=train, queries={"held-out": held_out})


def language(words: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=words, max_position_embeddings=32, **shape)).eval()
    tokens = torch.randint(words, (64, 32))
    return sw.Task(model, sw.losses.causal_lm, train=tokens[:48], queries={"val": tokens[48:]}, objective="tokens")


def part(predict: bool, width: int = 32, words: int = 0, checkpoints: int = 4, **chains: Any) -> dict[str, float]:
    """Predicted or measured, of one row."""
    torch.set_num_threads(1)
    task = language(words) if words else digits(width)
    optimizer, order = sw.Optimizer("sgd", 0.05, momentum=0.9), sw.BatchOrder(len(task.train), 16 if words else 64)
    steps = [20 * 2**k if checkpoints < 8 else 40 * (k + 1) for k in range(checkpoints)]
    run = sw.Trajectory.from_checkpoints(train_and_record(task, optimizer, order, steps))
    posterior, sampling = sw.LocalPosterior(window=4), sw.Chains(**chains)
    if predict:
        predicted = sampling_cost(task, run, posterior, sampling, steps, 1)
        return {"seconds": predicted.seconds, "memory": predicted.memory / 2**20, "disk": predicted.disk / 2**20}
    before, start = forget_peak(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        sample(task, run, posterior, out=folder, sampling=sampling)
        spent, held = time.process_time() - start, peak() - before
        disk = sum(file.stat().st_size for file in (Path(folder) / "cells").glob("*.zip"))
    return {"seconds": spent, "memory": held, "disk": disk / 2**20}


@dataclass(frozen=True)
class Timed(RunWork):
    """The work of a run that notes in a file, in every process, how long it takes."""

    def __call__(self) -> Any:
        start = time.process_time()
        found = super().__call__()
        self.note(start)
        return found

    def compute(self, task: sw.Task, cell: Any, progress: Any = silent) -> None:
        start = time.process_time()
        super().compute(task, cell, progress)
        self.note(start)

    def note(self, start: float) -> None:
        with (self.store.root / f"{NOTED}{os.getpid()}").open("a") as file:
            file.write(f"{time.process_time() - start}\n")


def run_part(predict: bool, folder: str, workers: int) -> dict[str, float]:
    """Predicted or measured, of a whole run: seconds of its cells, and of all else."""
    torch.set_num_threads(1)
    out = Path(folder) / f"run-{workers}"
    config = load_config(f"{folder}/config.yaml", [f"workers={workers}", f"out={out}"])
    if predict:
        found = estimate(config)
        return {"cells": found.parts["cells"], "all else": found.seconds - found.parts["cells"]}
    compute, start = Crew.compute, time.process_time()

    def timed(crew: Crew, cells: Any) -> None:
        compute(replace(crew, work=Timed(**vars(crew.work))), cells)

    Crew.compute = timed  # type: ignore[method-assign]
    pipeline.run(config)
    ours = time.process_time() - start
    spent = {file.name: sum(map(float, file.read_text().split())) for file in out.glob(f"{NOTED}*")}
    return {"cells": max(spent.values()), "all else": ours - spent.get(f"{NOTED}{os.getpid()}", 0.0)}


def runs() -> None:
    title = "a run of examples/own_model: predicted / measured, seconds of the processor"
    table = Table("workers", "cells", "ratio", "all else", "ratio", title=title)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", "runs"))
        subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for workers in (1, 2):
            said, was = (in_a_process(predict, {"folder": folder, "workers": workers}) for predict in (True, False))
            cells = []
            for what in ("cells", "all else"):
                cells += [f"{said[what]:.3g} / {was[what]:.3g}", f"{said[what] / was[what]:.2f}"]
            table.add_row(str(workers), *cells)
    console.print(table)


def in_a_process(predict: bool, settings: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", json.dumps(settings | {"predict": predict})]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return found


def main() -> None:
    columns = ("seconds", "ratio", "peak MiB", "ratio", "MiB", "ratio")
    table = Table("configuration", *columns, title="predicted / measured, on one thread")
    ratios: dict[str, list[float]] = {what: [] for what in HELD_OUT}
    for title, rows in GROUPS.items():
        table.add_section()
        table.add_row(f"[bold]{title}")
        for name, settings in rows.items():
            said, was = (in_a_process(predict, settings) for predict in (True, False))
            cells = []
            for what in ("seconds", "memory", "disk"):
                ratio = said[what] / was[what]
                cells += [f"{said[what]:.3g} / {was[what]:.3g}", f"{ratio:.2f}"]
                if rows in HELD_OUT.get(what, ()):
                    ratios[what].append(ratio)
            table.add_row(name, *cells)
    console.print(table)
    for what, of in ratios.items():
        worst = max(of, key=lambda ratio: max(ratio, 1 / ratio))
        close = sum(abs(ratio - 1) <= CLOSE for ratio in of)
        console.print(f"{what}, held out: worst ratio {worst:.2f}; within {CLOSE:.0%}: {close} of {len(of)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        given = json.loads(sys.argv[2])
        print(json.dumps((run_part if "folder" in given else part)(**given)))
    elif sys.argv[1:2] == ["--runs"]:
        runs()
    else:
        main()
