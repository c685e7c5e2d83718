"""What chains on a language model cost: peak memory, and time over the passes that they cannot do without.

    python benchmarks/language_memory.py

A model of the shape of Pythia-14M (50,304 words, 14 million parameters, random weights), contexts of 256 tokens,
batches of 8 in pieces of 2, 4 chains. Memory is the peak of the resident set of a process that does nothing else,
libraries included. A draw is timed beside its forward and backward passes alone, both in turn in one run.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from typing import Any

import torch
from peak import peak
from rich.console import Console
from rich.table import Table

WORDS, CONTEXT, BATCH, PIECE, CHAINS = 50_304, 256, 8, 2, 4
PARTS = ("sgld", "underdamped", "rmsprop_sgld", "curvature", "time")
STEP_SIZES = {"sgld": 1e-5, "underdamped": 1e-3, "rmsprop_sgld": 1e-6}  # stable by the localisation alone
console = Console(width=110)


def model_and_tokens() -> tuple[Any, torch.Tensor]:
    """Random ones, of the shape of Pythia-14M."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=WORDS,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
        )
    ).eval()
    return model, torch.randint(WORDS, (5 * BATCH, CONTEXT))


def language_task() -> Any:
    import stagewise as sw

    model, tokens = model_and_tokens()
    return sw.Task(
        model,
        sw.losses.causal_lm,
        train=tokens[: 4 * BATCH],
        candidates=range(BATCH),
        queries={"val": tokens[4 * BATCH :]},
        objective="tokens",
        forward_batch=PIECE,
    )


def by_hand(task: Any, sampler: str, draws: int, on_step: Any = None) -> Any:
    import stagewise as sw
    from stagewise.sampling.chains import sample_block

    posterior = sw.LocalPosterior(gamma=1e4, n_beta=1e3, require_localised=False)
    sampling = sw.Chains(
        sampler,
        chains=CHAINS,
        draws=draws,
        burn_in=1,
        thinning=1,
        step_size=STEP_SIZES[sampler],
        batch_size=BATCH,
        reflect=False,
    )
    return sample_block(task, sw.Checkpoint(0, task.state()), posterior, sampling, on_step=on_step)


def memory(sampler: str, draws: int) -> dict[str, float]:
    task = language_task()
    with_model = peak()
    checked: list[float] = []
    ends: list[float] = []
    tree = by_hand(task, sampler, draws, lambda *_: (checked.append(peak()), ends.append(time.process_time())))
    assert (tree["chains"]["status"] == "ok").all()
    cpu = sorted(after - before for before, after in itertools.pairwise(ends))[(len(ends) - 1) // 2]
    return {"model": with_model, "first": checked[0], "peak": peak(), "cpu of a draw": cpu / CHAINS}


def curvature(_: int) -> dict[str, float]:
    """Of 8 sequences, as many as one product is affordable for here."""
    import stagewise as sw
    from stagewise.derivatives import hessian_product
    from stagewise.evaluate import represented
    from stagewise.sampling import curvature

    task = language_task()
    density = sw.LocalPosterior(gamma=1e4, n_beta=1e3).at(task, sw.Checkpoint(0, task.state()))
    with_model, products = peak(), []

    def counted(point: Any, u: torch.Tensor, rows: torch.Tensor | None = None) -> Any:
        product = hessian_product(point, u, rows)
        return lambda v: (products.append(1), product(v))[1]

    curvature.hessian_product = counted
    start, spent = time.perf_counter(), time.process_time()
    curvature.extreme_curvature(density)
    return {
        "model": with_model,
        "peak": peak(),
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - spent,
        "products": len(products),
        "samples": len(represented(density)),
    }


def timed(draws: int) -> dict[str, Any]:
    """Processor seconds of every draw, and of its passes alone: gradients of chains and checkpoint, losses of all."""
    task = language_task()
    weights = list(task.model.parameters())
    batch, queries = task.train.batch(slice(0, BATCH)), task.queries["val"].batch(slice(None))
    ours: list[float] = []
    bare: list[float] = []
    last = [0.0]

    def passes() -> None:
        for _ in range(CHAINS + 1):
            for piece in torch.split(batch, PIECE):
                torch.autograd.grad(task.loss(task.model, piece)[0].mean(), weights)
        with torch.no_grad():
            for piece in (*torch.split(batch, PIECE), *torch.split(queries, PIECE)) * CHAINS:
                task.loss(task.model, piece)

    def step(*_: int) -> None:
        ours.append(time.process_time() - last[0])
        start = time.process_time()
        passes()
        bare.append(time.process_time() - start)
        last[0] = time.process_time()

    by_hand(task, "sgld", draws, step)
    return {"ours": ours[1:], "bare": bare[1:], "peak": peak()}


def part(name: str, draws: int) -> dict[str, Any]:
    if name == "time":
        return timed(draws)
    return curvature(draws) if name == "curvature" else memory(name, draws)


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    chosen = sys.argv[2:] or PARTS
    table = Table("part", "MiB with the model", "peak MiB", "more", title=f"{CHAINS} chains, {draws} draws")
    for name in chosen:
        command = [sys.executable, __file__, "--part", name, str(draws)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.strip().splitlines()[-1])
        more = {key: value for key, value in found.items() if key not in ("model", "peak")}
        if name == "time":
            ratios = sorted(a / b for a, b in zip(found["ours"], found["bare"], strict=True))
            more = {"seconds of a draw": min(found["ours"]), "over its passes (median)": ratios[len(ratios) // 2]}
        words = ", ".join(f"{key} {value:.4g}" for key, value in more.items())
        table.add_row(name, f"{found.get('model', 0):,.0f}", f"{found['peak']:,.0f}", words)
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(part(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
