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

Of a whole run of examples/own_model, cells and all else are told apart: with one worker in seconds of the processor;
with two in seconds by the clock, which other work on the machine makes longer, in the prediction and in the run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peak import forget_peak, peak
from rich.console import Console
from rich.table import Table
from torch import nn

import stagewise as sw

console = Console(width=130)
CLOSE = 0.25
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
    time.perf_counter = time.process_time  # before anything asks for it
    from stagewise.retraining.training import train_and_record
    from stagewise.run.chains_cost import sampling_cost
    from stagewise.run.engine import sample

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


def run_part(predict: bool, folder: str, workers: int) -> dict[str, float]:
    """Predicted or measured, of a whole run: seconds of its cells, and of all else."""
    if workers == 1:
        time.perf_counter = time.process_time
    from stagewise.run import pipeline
    from stagewise.run.config import load_config
    from stagewise.run.cost import estimate
    from stagewise.run.crew import Crew

    torch.set_num_threads(workers)
    config = load_config(f"{folder}/config.yaml", [f"workers={workers}", f"out={folder}/run-{workers}"])
    if predict:
        found = estimate(config)
        return {"cells": found.parts["cells"], "all else": found.seconds - found.parts["cells"]}
    compute, spent = Crew.compute, []

    def timed(crew: Crew, cells: Any) -> None:
        start = time.perf_counter()
        compute(crew, cells)
        spent.append(time.perf_counter() - start)

    Crew.compute, start = timed, time.perf_counter()  # type: ignore[method-assign]
    pipeline.run(config)
    return {"cells": sum(spent), "all else": time.perf_counter() - start - sum(spent)}


def runs() -> None:
    table = Table("examples/own_model", "cells", "ratio", "all else", "ratio", title="predicted / measured, seconds")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints", "runs"))
        subprocess.run([sys.executable, "train.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for workers, clock in ((1, "of the processor"), (2, "by the clock")):
            said, was = (in_a_process(predict, {"folder": folder, "workers": workers}) for predict in (True, False))
            cells = []
            for what in ("cells", "all else"):
                cells += [f"{said[what]:.3g} / {was[what]:.3g}", f"{said[what] / was[what]:.2f}"]
            table.add_row(f"{workers} worker(s), {clock}", *cells)
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
