"""How the cost of a run grows with the model: measured on small GPT-NeoX models, told for the shapes of Pythia.

    python benchmarks/growth.py

Random weights, one thread, processor time. The run: 20 checkpoints with Adam's moments, contexts of 128 tokens, batches
of 4 sequences; at each checkpoint exact influence of a window of 8 updates on 2 query groups, products of gradients,
and 4 chains of sgld of 250 steps and 20 draws on 16 training sequences and 8 queries.

Of each part at each size: seconds, and the floating-point operations of its products of matrices as torch counts them.
A forward pass of one token takes, of L layers of width d, V words and contexts of C tokens,

    F = 2 (12 L d^2 + V d) + 4 L d C

operations, and a gradient three times as many: with the parameters of the layers N = 12 L d^2 the usual 6 N.
Seconds and operations of a part are taken to be a line in F, memory beside the copies of the parameters a line in L d.
The lines through the two smaller sizes are held against the largest, which had no part in them; those of the table are
of all three. The shapes of Pythia are up to 1,000 times as large as what was measured, and no GPU was: its hours are
the operations that were counted over a rate that is assumed,

    GPU-hours = (10^15 operations) / (3.6 x sustained TFLOP/s).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Before anything asks for the clock: that of the processor, which other work on the machine changes little.
time.perf_counter = time.process_time

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peak import forget_peak, peak  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from timing import seconds  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import stagewise as sw  # noqa: E402
from stagewise.checkpoints.directory import write_checkpoint  # noqa: E402
from stagewise.run.chains_cost import copies, sampling_cost  # noqa: E402
from stagewise.run.estimator_cost import Window  # noqa: E402
from stagewise.run.moved_cost import Moved  # noqa: E402
from stagewise.run.priced import size  # noqa: E402
from stagewise.sampling.chains import sample_block  # noqa: E402

CONTEXT, BATCH, TRAIN, CANDIDATES, QUERIES, WINDOW, CHECKPOINTS, TFLOPS = 128, 4, 64, 16, 8, 8, 20, 100
POSTERIOR = sw.LocalPosterior(gamma=1e4, n_beta=1e3, require_localised=False)
SETTINGS = {"sampler": "sgld", "chains": 4, "step_size": 1e-5, "burn_in": 50, "thinning": 10, "batch_size": BATCH}
CHAINS = sw.Chains(draws=20, reflect=False, **SETTINGS)  # type: ignore[arg-type]
SHORT = sw.Chains(draws=1, reflect=False, **SETTINGS | {"burn_in": 1, "thinning": 1})  # type: ignore[arg-type]
PARTS = ("exact influence", "gradient product", "sampling")
console = Console(width=140)


class Shape(NamedTuple):
    """Of a GPT-NeoX."""

    name: str
    layers: int
    width: int
    heads: int
    words: int

    @property
    def parameters(self) -> int:
        """With both embeddings, biases and norms."""
        per_layer = 12 * self.width**2 + 13 * self.width
        return self.layers * per_layer + 2 * self.words * self.width + 2 * self.width

    @property
    def forward(self) -> float:
        """Floating-point operations of one token."""
        weights = 12 * self.layers * self.width**2 + self.words * self.width
        return 2.0 * weights + 4.0 * self.layers * self.width * CONTEXT


MEASURED = (Shape("small", 2, 64, 2, 1024), Shape("middle", 3, 128, 4, 1024), Shape("held out", 4, 192, 6, 1024))
PYTHIA = (
    Shape("14M", 6, 128, 4, 50_304),
    Shape("70M", 6, 512, 8, 50_304),
    Shape("160M", 12, 768, 12, 50_304),
    Shape("410M", 24, 1024, 16, 50_304),
    Shape("1.4B", 24, 2048, 16, 50_304),
)


def made(shape: Shape) -> tuple[sw.Task, sw.Checkpoint]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    layers = {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "attn_implementation": "eager"}
    widths = {"hidden_size": shape.width, "intermediate_size": 4 * shape.width, "vocab_size": shape.words}
    settings = GPTNeoXConfig(max_position_embeddings=CONTEXT, **layers, **widths)
    model = GPTNeoXForCausalLM(settings).eval()
    tokens = torch.randint(shape.words, (TRAIN + QUERIES, CONTEXT))
    task = sw.Task(
        model,
        sw.losses.causal_lm,
        train=tokens[:TRAIN],
        candidates=range(CANDIDATES),
        queries={"one": tokens[TRAIN : TRAIN + QUERIES // 2], "two": tokens[TRAIN + QUERIES // 2 :]},
        objective="tokens",
        forward_batch=BATCH,
    )
    moment = {name: torch.full_like(parameter, 1e-4) for name, parameter in model.named_parameters()}
    optimizer = sw.Optimizer("adam", 1e-4, batch_size=BATCH)
    return task, sw.Checkpoint(100, task.state(), optimizer, first_moment=moment, second_moment=moment)


def measured(shape: Shape) -> dict[str, Any]:
    """Seconds and operations of every part at one checkpoint, and bytes."""
    torch.set_num_threads(1)
    task, checkpoint = made(shape)
    run, order = sw.Trajectory.from_checkpoints([checkpoint]), sw.BatchOrder(TRAIN, BATCH)

    def exact(length: int) -> object:
        return sw.window_influence(task, run, window=length, order=order, per="sample", check=False)

    before = forget_peak()
    sample_block(task, checkpoint, POSTERIOR, SHORT)
    held = (peak() - before) * 2**20
    chains = sampling_cost(task, run, POSTERIOR, CHAINS, [checkpoint.step], 1)
    product = seconds(lambda: sw.gradient_product(task, run, POSTERIOR, per="sample"), repeats=1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, checkpoint)
        file = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    steps, draws = CHAINS.burn_in + CHAINS.draws * CHAINS.thinning, CHAINS.draws  # type: ignore[operator]
    one, two = (counted(lambda n=n: sample_block(task, checkpoint, POSTERIOR, longer(n))) for n in (1, 5))
    draw = counted(lambda: sample_block(task, checkpoint, POSTERIOR, longer(1, draws=2))) - one
    step = (two - one) / 4
    replayed = [counted(lambda n=n: exact(n)) for n in (1, 3)]
    update = (replayed[1] - replayed[0]) / 2
    return {
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "seconds": [Window.of(exact).of_length(WINDOW), product, chains.stages[0].seconds],
        "operations": [
            replayed[0] + (WINDOW - 1) * update,
            counted(lambda: sw.gradient_product(task, run, POSTERIOR, per="sample")),
            one + (steps - 2) * step + (draws - 1) * (draw - step),
        ],
        "memory": held,
        "traces": chains.disk,
        "file": file,
        "moved": list(Moved.of(task, checkpoint, CHECKPOINTS)),
    }


def longer(burn_in: int, draws: int = 1) -> sw.Chains:
    return sw.Chains(draws=draws, reflect=False, **SETTINGS | {"burn_in": burn_in, "thinning": 1})  # type: ignore[arg-type]


def counted(call: Callable[[], object]) -> float:
    """Floating-point operations of all products of matrices."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def line(x: list[float], y: list[float]) -> Callable[[float], float]:
    """Through points whose relative errors count alike."""
    slope, start = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    return lambda at: float(start + slope * at)


class Growth:
    """What was measured at some sizes, at any size."""

    def __init__(self, shapes: tuple[Shape, ...], found: list[dict[str, Any]]) -> None:
        forward = [shape.forward for shape in shapes]
        self.seconds, self.operations = (
            [line(forward, [one[what][k] for one in found]) for k in range(len(PARTS))]
            for what in ("seconds", "operations")
        )
        beside = [max(one["memory"] - parameter_bytes(shape), 1.0) for shape, one in zip(shapes, found, strict=True)]
        self.activations = line([float(shape.layers * shape.width) for shape in shapes], beside)

    def memory(self, shape: Shape) -> float:
        """Bytes of a worker's chains."""
        return parameter_bytes(shape) + max(self.activations(float(shape.layers * shape.width)), 0.0)


def parameter_bytes(shape: Shape) -> float:
    return 4.0 * copies(CHAINS, shape.parameters) * shape.parameters


def in_a_process(shape: Shape) -> dict[str, Any]:
    out = subprocess.run([sys.executable, __file__, json.dumps(shape)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(out.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    found = [in_a_process(shape) for shape in MEASURED]
    title = "at one checkpoint: seconds of one core, and 10^9 operations"
    table = Table("model", "parameters", *PARTS, "memory", "checkpoint", title=title)
    for shape, one in zip(MEASURED, found, strict=True):
        assert one["parameters"] == shape.parameters, (one["parameters"], shape.parameters)
        both = zip(one["seconds"], one["operations"], strict=True)
        cells = [f"{spent:.3g} s, {operations / 1e9:.3g}" for spent, operations in both]
        per = f"{one['file'] / shape.parameters:.1f} bytes each"
        table.add_row(shape.name, f"{shape.parameters:,}", *cells, size(one["memory"]), per)
    console.print(table)
    told, last = Growth(MEASURED[:2], found[:2]), MEASURED[-1]
    ratios = [
        f"{name}: seconds {of(last.forward) / found[-1]['seconds'][k]:.2f}, "
        f"operations {operations(last.forward) / found[-1]['operations'][k]:.2f}"
        for k, (name, of, operations) in enumerate(zip(PARTS, told.seconds, told.operations, strict=True))
    ]
    ratios.append(f"memory {told.memory(last) / found[-1]['memory']:.2f}")
    console.print(f"held out, predicted from the two smaller / measured: {'; '.join(ratios)}")
    grown = Growth(MEASURED, found)
    columns = ("hours of a core", "longest cell, h", "10^15 operations", f"GPU-hours at {TFLOPS} TFLOP/s")
    title = f"a run over {CHECKPOINTS} checkpoints of the shape of Pythia"
    table = Table("model", "parameters", *columns, "memory of a worker", "checkpoints", "traces", "read", title=title)
    for shape in PYTHIA:
        spent = [of(shape.forward) for of in grown.seconds]
        operations = CHECKPOINTS * sum(of(shape.forward) for of in grown.operations)
        file, data = found[-1]["file"] / MEASURED[-1].parameters * shape.parameters, found[-1]["moved"][1]
        cells = CHECKPOINTS * len(PARTS)
        read = Moved(file, data, CHECKPOINTS).read(workers=CHECKPOINTS, cells=cells)
        table.add_row(
            shape.name,
            f"{shape.parameters / 1e6:,.0f} M",
            f"{CHECKPOINTS * sum(spent) / 3600:,.1f}",
            f"{max(spent) / 3600:.2g}",
            f"{operations / 1e15:,.2g}",
            f"{operations / (TFLOPS * 1e12 * 3600):.2g}",
            size(grown.memory(shape)),
            size(CHECKPOINTS * file),
            size(CHECKPOINTS * found[-1]["traces"]),
            size(read),
        )
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measured(Shape(*json.loads(sys.argv[1])))))
    else:
        main()
