"""Two other libraries on the language model of estimators.py, against the same retraining, and what they cost.

    make peers      or      python benchmarks/peers.py --peers PYTHON [--draws 5]

PYTHON is that of an environment with peers-requirements.txt, apart from ours. This file runs in both: ours records the
run, retrains its windows and scores; the other environment reads a checkpoint with its window's batches from an .npz
file and writes the influence of classes of tokens on one another into another.

AdamW-influence   of `dattri-llm`: the window's updates differentiated backwards through AdamW's own state, with the
                  empirical Fisher matrix of every batch for its curvature. As `exact replay`, it knows the batches.
                  A sample is what one sequence holds of one class; a batch is the mean over these, as in the run.
BIF               of `devinterp`: covariances of token losses over SGLD chains. The library has no defaults for step and
                  temperature, and knows no window: once as its README has it, once held near the checkpoint as in
                  language_memory.py. Nothing is tuned.

r and slope are those of estimators.py, at its two checkpoints. Seconds are of the CPU, of one checkpoint. MiB is
the peak of the resident set beyond what the process has with libraries and data loaded (Linux). At the end a draw of
`devinterp` beside one of ours, with the model and batches of language_memory.py: four chains of a few draws, in
the same pieces, and as it comes, the batch in one.
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
from typing import Any

import numpy as np
import torch
from language import CLASSES, LanguageModel, token_losses
from peak import forget_peak, peak
from torch import Tensor
from torch.nn import functional

Arrays = dict[str, np.ndarray[Any, Any]]
WIDTH, LAYERS, HEADS = 64, 2, 4  # of the model of exact_accuracy.py
README = {"lr": 1e-3, "n_beta": 30.0}
HELD = {"lr": 1e-5, "n_beta": 1e3, "localization": 1e4}
DRAWS = 50  # of each of four chains on the small model, as in the library's own quick start
SEQUENCES = 32  # of one forward pass over held-out text, of one chain's batch


# What the other environment does


class Hooked(LanguageModel):
    """Positions as a call of their table for every sequence, which hooks see; the same function."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]).expand_as(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def model_at(given: Arrays, kind: type[LanguageModel]) -> LanguageModel:
    """The model at the checkpoint."""
    context, vocabulary = given["train"].shape[1], len(given["params/embed.weight"])
    model = kind(vocabulary, WIDTH, LAYERS, HEADS, context, tied=False)
    model.load_state_dict(named(given, "params"))
    return model.eval()


def named(given: Arrays, kind: str) -> dict[str, Tensor]:
    return {name.split("/", 1)[1]: torch.from_numpy(value) for name, value in given.items() if name.startswith(kind)}


def adam_at(given: Arrays, model: LanguageModel) -> torch.optim.Adam:
    """The run's optimiser at the checkpoint."""
    first, second = named(given, "first"), named(given, "second")
    optimizer = torch.optim.Adam(
        model.parameters(), lr=float(given["rate"]), betas=tuple(given["betas"].tolist()), eps=float(given["eps"])
    )
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(given["step"])),
            "exp_avg": first[name].clone(),
            "exp_avg_sq": second[name].clone(),
        }
    return optimizer


def by_class(tokens: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence once for each class, classes fastest, and which of its predicted tokens are of that."""
    own = classes[:, None] == torch.arange(len(CLASSES))[:, None]
    return tokens.repeat_interleave(len(CLASSES), 0), own.flatten(0, 1).float()


def adamw_influence(given: Arrays, _options: dict[str, float]) -> np.ndarray[Any, Any]:
    """Nats per unit weight of one token, ``(train class, query class)``."""
    from dattri_llm import (
        REGISTER_ALL,
        AdamWInfluenceAttributor,
        AttributionArguments,
        AttributionTask,
        HookManager,
        HookManagerCallback,
        HookManagerConfig,
        OptimizerStateCallback,
        ParameterSnapshotCallback,
        TrajectorySnapshots,
    )
    from dattri_llm.gradient import ops

    class Queries(HookManagerCallback):
        """Sums of the gradients of the samples of every class."""

        total: dict[str, Tensor]

        def __init__(self) -> None:
            self.total = {}

        def on_step_end(self, record: Any) -> None:
            for name, value in record.gradient.data.items():
                dense = (
                    value if isinstance(value, Tensor) else ops.materialize(value, record.gradient.layer_types[name])
                )
                summed = dense.reshape(-1, len(CLASSES), dense[0].numel()).sum(0)
                self.total[name] = self.total.get(name, 0) + summed

    train, held = torch.from_numpy(given["train"]), torch.from_numpy(given["held_out"])
    classes, held_classes = torch.from_numpy(given["train_classes"]), torch.from_numpy(given["held_out_classes"])
    model = model_at(given, Hooked)
    optimizer, hooks = adam_at(given, model), HookManagerConfig(linear_io=REGISTER_ALL)

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, counted = batch
        return (token_losses(model, (tokens,)) * counted).sum() / counted.sum()

    with tempfile.TemporaryDirectory() as folder:
        kept = TrajectorySnapshots(folder)
        record = OptimizerStateCallback(model, optimizer, snapshots=kept)
        manager = HookManager(model, config=hooks, callbacks=[ParameterSnapshotCallback(model, kept), record])
        with manager.collect(deregister_on_exit=True):
            for made, rows in enumerate(torch.from_numpy(given["batches"])):
                kept.save_batch(made, by_class(train[rows], classes[rows]))
                optimizer.zero_grad()
                token_losses(model, (train[rows],)).mean().backward()
                optimizer.step()
                record.record_post(made)
        window, queries = len(given["batches"]), Queries()
        with HookManager(model, config=hooks, callbacks=[queries]).collect(deregister_on_exit=True):
            for rows in torch.arange(len(held)).split(SEQUENCES):
                tokens, counted = by_class(held[rows], held_classes[rows])
                (token_losses(model, (tokens,)) * counted).sum().backward()
        layers = sorted(queries.total)
        if sum(queries.total[name].shape[1] for name in layers) != sum(p.numel() for p in model.parameters()):
            raise RuntimeError("some parameters are not captured")
        sizes = torch.bincount(held_classes.flatten(), minlength=len(CLASSES))[:, None]
        arguments = AttributionArguments(folder, use_cpu=True, max_grad_norm=None)
        attributor = AdamWInfluenceAttributor(arguments, task=AttributionTask(loss, model))
        # Of all that `attribute_from_cache` does this leaves out one column for every held-out sample.
        source = attributor.open_train_source(kept, hook_config=hooks)
        steps = range(window)
        scores, _, at = attributor.sweep_queries(
            source,
            attributor.load_dynamics(source, None),
            torch.cat([queries.total[name] / sizes for name in layers], 1),
            layers=layers,
            prop_steps=list(steps),
            output_steps=set(steps),
        )
        attributor.close_source(source)
    whole = scores.view(len(at) // len(CLASSES), len(CLASSES), -1).sum(0)
    trained = torch.bincount(classes.flatten(), minlength=len(CLASSES))[:, None]
    return (whole / trained).double().numpy()


def covariances(given: Arrays, options: dict[str, float]) -> np.ndarray[Any, Any]:
    """Minus the mean covariance of the losses of two tokens, ``(train class, query class)``: no unit."""
    from datasets import Dataset
    from devinterp.slt.bif import compute_bif
    from devinterp.slt.sampling import sample

    def dataset(tokens: np.ndarray[Any, Any]) -> Any:
        return Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")

    seen = {"asked": ("held_out", given["asked"]), "followed": ("train", given["followed"])}
    with tempfile.TemporaryDirectory() as folder:
        traces = sample(
            model_at(given, LanguageModel),
            dataset(given["train"]),
            {name: (dataset(given[kind][rows]), len(rows) // SEQUENCES) for name, (kind, rows) in seen.items()},
            num_chains=4,
            num_draws=DRAWS,
            batch_size=SEQUENCES,
            device="cpu",
            output_path=Path(folder) / "traces.zarr",
            **options,
        ).load()
    count = len(given["asked"])
    found = compute_bif(
        traces,
        loss_keys=list(seen),
        batch_index_range_1=range(count, count + len(given["followed"])),
        batch_index_range_2=range(count),
        compute_covariance=True,
        batch_size=4,
        device="cpu",
    )
    # The library shuffles what it follows, and keeps the tokens alone.
    places = [shuffled(given[kind][rows], traces[f"input_ids_{name}"].values) for name, (kind, rows) in seen.items()]
    asked, followed = (
        torch.from_numpy(given[f"{kind}_classes"][rows][place])
        for place, (kind, rows) in zip(places, seen.values(), strict=True)
    )
    own, queried = (functional.one_hot(k, len(CLASSES)).double() for k in (followed, asked))
    pairs = torch.from_numpy(found["influences"].values).double()
    sums = torch.einsum("abst,asi,btj->ij", pairs, own, queried)
    return -(sums / own.sum((0, 1))[:, None] / queried.sum((0, 1))).numpy()


def shuffled(tokens: np.ndarray[Any, Any], stored: np.ndarray[Any, Any]) -> list[int]:
    """Which of some sequences every stored one is."""
    where = {row.tobytes(): k for k, row in enumerate(tokens.astype(np.int64))}
    return [where[row.tobytes()] for row in stored.astype(np.int64)]


def draws_of_devinterp(draws: int, pieces: int) -> dict[str, float]:
    """One draw on the model of language_memory.py, a batch in so many pieces: CPU seconds, and memory."""
    from language_memory import BATCH, CHAINS, model_and_tokens

    model, tokens = model_and_tokens()
    with_model, sets = peak(), (tokens[: 4 * BATCH], tokens[4 * BATCH :])
    spent = cpu_of_a_draw(model, *sets, CHAINS, draws, BATCH, pieces, **HELD)
    return {"model": with_model, "peak": peak(), "cpu of a draw": spent}


def cpu_of_a_draw(
    model: Any, train: Tensor, val: Tensor, chains: int, draws: int, batch: int, pieces: int, **settings: Any
) -> float:
    """CPU seconds of a draw of `devinterp`, with the losses of as many candidates as a batch has, and of ``val``."""
    from datasets import Dataset
    from devinterp.slt.lm_loss import compute_per_token_loss
    from devinterp.slt.sampling import sample

    calls: list[float] = []

    def stamped(model: Any, input_ids: Tensor) -> Tensor:
        calls.append(time.process_time())
        return compute_per_token_loss(model, input_ids)

    def dataset(rows: Tensor) -> Any:
        return Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")

    with tempfile.TemporaryDirectory() as folder:
        sample(
            model,
            dataset(train),
            {"candidates": (dataset(train[:batch]), pieces), "val": (dataset(val), pieces)},
            num_chains=chains,
            num_draws=draws,
            batch_size=batch // pieces,
            gradient_accumulation_steps=pieces,
            num_init_loss_batches=1,
            device="cpu",
            loss_fn=stamped,
            output_path=Path(folder) / "traces.zarr",
            **settings,
        )
    # Losses at the checkpoint for each chain, then of every draw a batch and both sets that are followed.
    starts = np.array(calls[chains * pieces :]).reshape(chains, draws, 3 * pieces)[:, :, 0]
    return float(np.median(np.diff(starts)))


PARTS: dict[str, tuple[Callable[[Arrays, dict[str, float]], np.ndarray[Any, Any]], dict[str, float], bool]] = {
    "dattri-llm, AdamW-influence": (adamw_influence, {}, True),
    "devinterp, BIF as its README": (covariances, README, False),
    "devinterp, BIF held near": (covariances, HELD, False),
}


def work(name: str, given: Path, out: Path) -> None:
    """One row at one checkpoint."""
    estimate, options, _ = PARTS[name]
    import datasets  # noqa: F401
    import dattri_llm  # noqa: F401
    import devinterp.slt.sampling  # noqa: F401

    arrays = dict(np.load(given))
    before, start = forget_peak(), time.process_time()
    value = estimate(arrays, options)
    np.savez(out, value=value, seconds=time.process_time() - start, peak=peak() - before)


# What ours does


def compare(python: str, draws: int) -> None:
    import problems
    import xarray as xr
    from exact_accuracy import Text, compared, record_language
    from held_out import spread
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=150)
    text = Text.of_library()
    table = Table("estimator", "r", "slope", "CPU seconds", "MiB", title="language model, W = 30: median [range]")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record_language(text.task(), folder / "checkpoints")
        problem = problems.language(folder)
        for step in problem.steps:
            np.savez(folder / f"{step}.npz", **exported(problem, step))
        sizes = np.bincount(text.train_classes.flatten().numpy(), minlength=len(CLASSES))
        for part, (_, _, nats) in PARTS.items():
            found = []
            for step in problem.steps:
                out = folder / "out.npz"
                run(python, "--part", part, str(folder / f"{step}.npz"), str(out))
                found.append(dict(np.load(out)))
            values = np.stack([answer["value"] for answer in found])
            coords = {"step": list(problem.steps), "train": list(CLASSES), "query": list(CLASSES)}
            influence = xr.Dataset(
                {"value": (("step", "train", "query"), values)}, {**coords, "train_size": ("train", sizes)}
            )
            scores = compared(influence, problem.measured)
            cost = [float(np.median([answer[key] for answer in found])) for key in ("seconds", "peak")]
            slope = spread(scores["slope"]) if nats else "-"
            cells = [part, spread(scores["correlation"]), slope, *(f"{number:,.0f}" for number in cost)]
            table.add_row(*map(escape, cells))
    console.print(table)
    ours = [sys.executable, str(Path(__file__).with_name("language_memory.py"))]
    table = Table("chains on the shape of Pythia-14M", "MiB with the model", "peak MiB", "CPU seconds of a draw")
    for name, command in {
        "stagewise, in pieces of 2": [*ours, "--part", "sgld", str(draws)],
        "devinterp, in pieces of 2": [python, __file__, "--draws-of", str(draws), "4"],
        "devinterp, the batch whole": [python, __file__, "--draws-of", str(draws), "1"],
    }.items():
        got = json.loads(printed(command).strip().splitlines()[-1])
        table.add_row(name, *(f"{got[key]:,.0f}" for key in ("model", "peak")), f"{got['cpu of a draw']:.1f}")
    console.print(table)


def exported(problem: Any, step: int) -> Arrays:
    """A checkpoint, its window's batches and the data."""
    from stagewise.evaluate import spread_rows

    checkpoint, text = problem.run.load(step), problem.text
    optimizer, window = checkpoint.optimizer, problem.window
    if checkpoint.changing_rates(window) or optimizer.weight_decay or optimizer.clip_norm or checkpoint.update_counts:
        raise ValueError("the other side is told of one learning rate, and of neither decay, clipping nor counts")
    tensors = {"params": checkpoint.params, "first": checkpoint.first_moment, "second": checkpoint.second_moment}
    return {
        **{f"{kind}/{name}": value.numpy() for kind, part in tensors.items() for name, value in part.items()},
        **{name: getattr(text, name).numpy() for name in ("train", "held_out", "train_classes", "held_out_classes")},
        "batches": torch.stack(checkpoint.coming_batches[:window]).numpy(),
        "followed": np.array(spread_rows(64, len(text.train))),
        "asked": np.array(spread_rows(64, len(text.held_out))),
        "step": np.array(step),
        "rate": np.array(optimizer.learning_rate),
        "betas": np.array(optimizer.betas),
        "eps": np.array(optimizer.eps),
    }


def run(python: str, *arguments: str) -> str:
    return printed([python, __file__, *arguments])


def printed(command: list[str]) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Other libraries against the same retraining.")
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment with peers-requirements.txt")
    parser.add_argument("--draws", type=int, default=5, help="of each chain on the large vocabulary")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--draws-of", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, given, out = options.part
        work(name, Path(given), Path(out))
    elif options.draws_of:
        print(json.dumps(draws_of_devinterp(*options.draws_of)))
    elif options.peers:
        compare(options.peers, options.draws)
    else:
        parser.error("--peers PYTHON is needed: that of the other environment")


if __name__ == "__main__":
    main()
