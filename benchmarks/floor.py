"""Chains against their floor, and beside another library: what a draw, an update and a matrix of influence cost.

    make peers      or      python benchmarks/floor.py [--peers PYTHON] [--full]

PYTHON is that of an environment with peers-requirements.txt, for `devinterp`; this file runs in both. Each part is a
process of its own; seconds are of the processor, and memory is the peak beyond what the process held before (Linux).

chains      a GPT-NeoX of two layers of width 128, 2,048 words, contexts of 128, batches of 16 of each chain's own, four
            chains, RMSprop-SGLD, losses of all tokens of 16 candidates and 16 others at every draw; `bare` is the same
            passes without anything else, in turn with ours
update      one step of one chain of 70 million parameters, in the shapes of Pythia-70M, the gradient being there
pairs       influence of every token of 32 sequences on every token of 32 others, 63 tokens each, from 4 x 48 draws
strongest   with --full: the ten tokens of 512 sequences that help and harm every token of 64 others most, 511 tokens
            each, from 4 x 50 draws in float32; `bare` is the products of deviations alone, in the same blocks. The
            matrix of all pairs, in float32, would take 34 GB
digits      32 chains at some checkpoints of the digits network, beside one chain at a time in plain PyTorch
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peak import forget_peak, peak
from torch import Tensor, nn

WORDS, CONTEXT, BATCH, CHAINS = 2_048, 128, 16, 4
SETTINGS = {"lr": 1e-6, "n_beta": 1e3, "localization": 1e4}
HUGE = 70_385_664  # numbers in the matrices of Pythia-70M
SEQUENCES, TOKENS = 32, 63
MANY, LONG, FEW_QUERIES, BLOCK = 512, 511, 64, 2_048  # sequences, their tokens, sequences of queries, tokens of a block
AT, STEPS, KEPT = 5, 100, 5  # checkpoints, sampler steps and draws of the chains on digits
Numbers = dict[str, float]


def cpu(call: Callable[[], object], repeats: int = 1) -> float:
    """Least processor seconds of a call."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return min(spent)


# Chains on a language model


def model_and_tokens() -> tuple[Any, Tensor]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = GPTNeoXConfig(vocab_size=WORDS, max_position_embeddings=CONTEXT, **shape)
    return GPTNeoXForCausalLM(config).eval(), torch.randint(WORDS, (6 * BATCH, CONTEXT))


def chains_of_ours(draws: int) -> Numbers:
    import stagewise as sw
    from stagewise.sampling.chains import sample_block

    model, tokens = model_and_tokens()
    train, others = tokens[: 5 * BATCH], tokens[5 * BATCH :]
    task = sw.Task(
        model, sw.losses.causal_lm, train=train, candidates=range(BATCH), queries={"val": others}, objective="tokens"
    )
    weights = list(task.model.parameters())

    def passes() -> None:
        """The floor: a gradient, and the losses of candidates and queries, of every chain."""
        for _ in range(CHAINS):
            torch.autograd.grad(task.loss(task.model, train[:BATCH])[0].mean(), weights)
            with torch.no_grad():
                task.loss(task.model, train[:BATCH]), task.loss(task.model, others)

    ours, bare, last = [], [], [0.0]

    def step(*_: int) -> None:
        ours.append(time.process_time() - last[0])
        bare.append(cpu(passes))
        last[0] = time.process_time()

    posterior = sw.LocalPosterior(
        gamma=SETTINGS["localization"], n_beta=SETTINGS["n_beta"], require_localised=False, centred=False
    )
    settings = {"burn_in": 2, "thinning": 1, "step_size": SETTINGS["lr"], "batch_size": BATCH, "single_tokens": True}
    sampling = sw.Chains("rmsprop_sgld", CHAINS, 1, draws, control_variate=False, reflect=False, **settings)
    before = forget_peak()
    sample_block(task, sw.Checkpoint(0, task.state()), posterior, sampling, on_step=step)
    of_draws = slice(3, None)  # after the first step and burn-in
    ratios = np.array(ours[of_draws]) / np.array(bare[of_draws])
    return {
        "cpu of a draw": float(np.median(ours[of_draws])) / CHAINS,
        "of its bare passes": float(np.median(bare[of_draws])) / CHAINS,
        "over the bare passes": float(np.median(ratios)),
        "MiB": peak() - before,
    }


def chains_of_devinterp(draws: int) -> Numbers:
    from peers import cpu_of_a_draw

    model, tokens = model_and_tokens()
    before, sets = forget_peak(), (tokens[: 5 * BATCH], tokens[5 * BATCH :])
    spent = cpu_of_a_draw(model, *sets, CHAINS, draws, BATCH, 1, sampling_method="rmsprop_sgld", **SETTINGS)
    return {"cpu of a draw": spent, "MiB": peak() - before}


# One update


def update_of_ours(repeats: int) -> Numbers:
    """With everything that is done to vectors: the model's weights from the chain's, the drift, the step."""
    from stagewise.sampling.base import Gradient
    from stagewise.sampling.gradient import of_potential
    from stagewise.sampling.tuning import LANGEVIN

    slope, anchor, noise = torch.randn(1, HUGE), torch.zeros(HUGE), torch.Generator().manual_seed(0)
    density: Any = SimpleNamespace(n_beta=SETTINGS["n_beta"], gamma=SETTINGS["localization"])

    def gradient(u: Tensor) -> Gradient:
        torch.add(anchor, u[0])
        return of_potential(density, u, slope, None)

    found = {}
    for name in ("sgld", "rmsprop_sgld"):
        sampler = LANGEVIN[name].tuned(1.0, 1.0)
        states = [sampler.init(torch.zeros(1, HUGE), noise)]

        def step(sampler: Any = sampler, states: list[Any] = states) -> None:
            states.append(sampler.step(states.pop(), gradient, noise))

        step()
        states.append(sampler.freeze(states.pop()))
        found[name] = cpu(step, repeats)
    return found


def update_of_devinterp(repeats: int) -> Numbers:
    from devinterp.optim.sgmcmc import SGMCMC

    # Of the shapes of Pythia-70M.
    words, width = 50_304, 512
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = [(words, width), *layer * 6, (words, width)]
    found = {}
    for name in ("sgld", "rmsprop_sgld"):
        parts = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        settings = {"lr": 1e-6, "nbeta": SETTINGS["n_beta"], "localization": SETTINGS["localization"]}
        optimizer = getattr(SGMCMC, name)(parts, **settings)
        for part in parts:
            part.grad = torch.randn_like(part)
        optimizer.step()
        found[name] = cpu(optimizer.step, repeats)
    return found


# Pairs of tokens


def losses() -> tuple[np.ndarray[Any, Any], ...]:
    random = np.random.default_rng(0)
    shape = (CHAINS, 48, SEQUENCES, TOKENS)
    common = random.normal(size=(*shape[:2], 1, 1))
    first, second = ((3 + common + random.normal(size=shape)).astype(np.float32) for _ in range(2))
    return first, second


def in_memory(train: np.ndarray[Any, Any], query: np.ndarray[Any, Any]) -> Any:
    """Traces of losses ``(chain, draw, sequence, token)``, all of equal weight."""
    import xarray as xr

    import stagewise as sw

    def data(loss: np.ndarray[Any, Any]) -> xr.Dataset:
        dims = ("chain", "draw", "sample", "token")
        share = np.full(loss.shape[2:], 1 / loss[0, 0].size)
        parts = {"loss": (dims, loss), "loss_anchor": (dims[2:], loss[0, 0]), "share": (dims[2:], share)}
        return xr.Dataset(parts, {"sample": np.arange(loss.shape[2])})

    chains = xr.Dataset({"status": ("chain", np.full(CHAINS, "ok"))}, {"chain": np.arange(CHAINS)})
    tree = xr.DataTree.from_dict({"train": data(train), "queries/val": data(query), "chains": chains})
    tree.attrs = {"n_beta": float(train[0, 0].size), "step": 0}
    return sw.TracesInMemory({0: tree})


def pairs_of_ours(out: str) -> Numbers:
    import stagewise as sw

    traces, found = in_memory(*losses()), []
    before = forget_peak()

    def call() -> None:
        found.clear()
        found[:] = [sw.bif(traces, tokens=True, grouped=False, trusted_only=False)["value"].values[0]]

    spent = cpu(call, 3)
    np.save(out, -found[0].reshape(SEQUENCES, TOKENS, SEQUENCES, TOKENS).transpose(0, 2, 1, 3))
    return {"cpu": spent, "MiB": peak() - before}


def pairs_of_devinterp(out: str) -> Numbers:
    import xarray as xr
    from devinterp.slt.bif import compute_bif

    parts = {}
    for name, loss in zip(("a", "b"), losses(), strict=True):
        parts[f"loss_{name}"] = (("chain", "draw", f"batch_{name}", "token_pos"), loss)
        parts[f"input_ids_{name}"] = ((f"batch_{name}", "token"), np.zeros((SEQUENCES, TOKENS + 1), dtype=np.int64))
    traces, before, found = xr.DataTree(xr.Dataset(parts)), forget_peak(), []
    ranges = {"batch_index_range_1": range(SEQUENCES), "batch_index_range_2": range(SEQUENCES, 2 * SEQUENCES)}

    def call() -> None:
        found.clear()
        found[:] = [compute_bif(traces, **ranges, compute_covariance=True, device="cpu")["influences"].values]

    spent = cpu(call, 3)
    np.save(out, found[0])
    return {"cpu": spent, "MiB": peak() - before}


def strongest_of_ours(_: str) -> Numbers:
    import stagewise as sw

    random = np.random.default_rng(0)
    sides = []
    for sequences in (MANY, FEW_QUERIES):
        side = random.standard_normal((CHAINS, 50, sequences, LONG), dtype=np.float32)
        side += 3 + random.standard_normal((CHAINS, 50, 1, 1), dtype=np.float32)
        sides.append(side)
    left, right = (torch.from_numpy(side).flatten(0, 1).flatten(1) for side in sides)

    def products() -> None:
        for some in left.split(BLOCK, 1):
            for others in right.split(BLOCK, 1):
                some.T @ others

    bare, traces = cpu(products), in_memory(*sides)
    before = forget_peak()
    spent = cpu(lambda: sw.strongest(traces, tokens=True, trusted_only=False))
    return {"cpu": spent, "of its bare products": bare, "MiB beyond traces": peak() - before, "MiB in all": peak()}


# Many chains of a small network


def digits(_: str) -> Numbers:
    """Chains of ours, and one after the other by hand, on the same network, data, batches and draws."""
    import stagewise as sw
    from stagewise.sampling.chains import sample_block
    from stagewise.studies.digits.training import record, task

    step_size, n_beta, gamma, size, chains = 1e-5, 1e3, 1e4, 64, 32
    posterior = sw.LocalPosterior(gamma=gamma, n_beta=n_beta, require_localised=False, centred=False)
    settings = {"burn_in": 0, "thinning": STEPS // KEPT, "step_size": step_size, "batch_size": size}
    sampling = sw.Chains("sgld", chains, 1, KEPT, control_variate=False, reflect=False, **settings)
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "run", size, range(0, 20 * AT, 20))
        run = sw.Trajectory.from_directory(Path(folder) / "run")
        checkpoints = [run.load(step) for step in run.steps]
    problem = task()
    ours = cpu(lambda: [sample_block(problem, checkpoint, posterior, sampling) for checkpoint in checkpoints])
    model, train = problem.model, problem.train.batch(slice(None))
    queries = [data.batch(slice(None)) for data in problem.queries.values()]
    weights, seen = list(model.parameters()), []

    def by_hand() -> None:
        for checkpoint in checkpoints:
            start = [checkpoint.params[name] for name, _ in model.named_parameters()]
            for _ in range(chains):
                with torch.no_grad():
                    torch._foreach_copy_(weights, start)
                for step in range(1, STEPS + 1):
                    rows = torch.randint(len(problem.train), (size,))
                    drift = torch.autograd.grad(problem.loss(model, [part[rows] for part in train]).mean(), weights)
                    with torch.no_grad():
                        drift = torch._foreach_mul(drift, n_beta)
                        torch._foreach_add_(drift, torch._foreach_sub(weights, start), alpha=gamma)
                        torch._foreach_add_(weights, drift, alpha=-step_size / 2)
                        torch._foreach_add_(weights, [torch.randn_like(part) for part in weights], alpha=step_size**0.5)
                        if step % (STEPS // KEPT) == 0:
                            seen.append([problem.loss(model, batch) for batch in (train, *queries)])

    return {"cpu of ours": ours, "cpu by hand": cpu(by_hand)}


OURS: dict[str, Callable[[Any], Numbers]] = {
    "chains": chains_of_ours,
    "update": update_of_ours,
    "pairs": pairs_of_ours,
    "digits": digits,
    "strongest": strongest_of_ours,
}
THEIRS: dict[str, Callable[[Any], Numbers]] = {
    "chains": chains_of_devinterp,
    "update": update_of_devinterp,
    "pairs": pairs_of_devinterp,
}


def measured(python: str, whose: str, part: str, argument: str) -> Numbers:
    command = [python, __file__, "--part", whose, part, argument]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    numbers: Numbers = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def compare(peers: str | None, draws: int, full: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    threads = f"{torch.get_num_threads()} threads"
    table = Table("part", "measured", "ours", "devinterp", "devinterp / ours", title=threads)
    with tempfile.TemporaryDirectory() as folder:
        for part in OURS if full else [part for part in OURS if part != "strongest"]:
            paths = {whose: str(Path(folder) / f"{whose}.npy") for whose in ("ours", "theirs")}
            argument = {"chains": str(draws), "update": "3"}
            ours = measured(sys.executable, "ours", part, argument.get(part, paths["ours"]))
            theirs = {}
            if peers and part in THEIRS:
                theirs = measured(peers, "theirs", part, argument.get(part, paths["theirs"]))
            for name, value in ours.items():
                other = theirs.get(name)
                cells = ("", "") if other is None else (f"{other:.4g}", f"{other / value:.2f}")
                table.add_row(part, name, f"{value:.4g}", *cells)
            if part == "pairs" and theirs:
                difference = float(np.abs(np.load(paths["ours"]) - np.load(paths["theirs"])).max())
                table.add_row(part, "largest difference of two values", f"{difference:.1e}", "", "")
            if part == "digits":
                table.add_row(part, "by hand / ours", f"{ours['cpu by hand'] / ours['cpu of ours']:.2f}", "", "")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Chains against their floor.")
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment with peers-requirements.txt")
    parser.add_argument("--draws", type=int, default=50, help="of each chain on the language model")
    parser.add_argument("--full", action="store_true", help="the part that takes minutes, too")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        whose, part, argument = options.part
        numeric = int(argument) if argument.isdigit() else argument
        print(json.dumps((OURS if whose == "ours" else THEIRS)[part](numeric)))
    else:
        compare(options.peers, options.draws, options.full)


if __name__ == "__main__":
    main()
