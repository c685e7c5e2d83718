"""The exact influence of a window against retraining it, and what it costs.

    python benchmarks/exact_accuracy.py [--only TEXT]

Its parts, of which --only runs those whose name holds TEXT:

digits            classes of handwritten digits at 32 checkpoints, full batch and minibatches of 64
samples           single digits that are called most helpful or harmful, left out, against others like them
held-out          three small problems and patches of photographs, five optimisers each: with the run's own batches, and
                  with fresh ones, those of the prediction others than those of the measurement
small changes     the same for smaller and smaller changes of weight, of which the influence is the limit; float64
language model    classes of tokens in a small transformer that is trained on Python's standard library
cost              processor time of the influence over that of the window's own training, on one thread
memory            peak memory for a transformer of 70 million parameters; only where asked for (half an hour)

Each part holds `window_influence` against what `window_ablation` measures with weights of .95 or .8 during the window.
r and slope (measured / predicted) are over pairs of different groups where train groups and query groups have the same
names. Nothing is tuned: apart from windows and seeds, every setting of stagewise is its default.
"""

from __future__ import annotations

import argparse
import copy
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import held_out
import numpy as np
import torch
import xarray as xr
from held_out import OPTIMISERS, PROBLEMS, Problem, cross_entropy, spread, thirds
from language import CLASSES, LanguageModel, class_loss, standard_library, token_losses, tokenised
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor, nn

import stagewise as sw
from stagewise.checkpoints.directory import write_checkpoint
from stagewise.results import headline
from stagewise.retraining.scores import coverage
from stagewise.retraining.training import train_and_record
from stagewise.studies.digits import training as digit_run

console = Console(width=150)
EARLY = 10  # until this step Adam's moments are young, and effects of finite changes are no derivatives


def compared(influence: xr.Dataset, measured: xr.Dataset) -> xr.Dataset:
    """Correlation and slope at every checkpoint, of pairs of different groups where there are any of the same."""
    steps = influence["step"].values
    effect = sw.predicted_effect(influence, measured.attrs["weight"])["effect"]
    found = sw.agreement(effect, measured["effect"].sel(step=steps))
    return found[[headline(found, name) for name in ("correlation", "slope")]].rename(
        {headline(found, name): name for name in ("correlation", "slope")}
    )


# Digits

DIGIT_STEPS = sw.log_spaced(1500, 32, first=8)
BATCHES = {"full batch": 0, "batches of 64": 64}


def digits() -> None:
    """Windows of 30 updates from all checkpoints, and of 100 from every third."""
    summary = Table(
        "run", "W", "weight", "r", "slope", f"slope after step {EARLY}", title=escape("digits: median [range]")
    )
    detail = Table("step", title="digits, W = 30: r, slope")
    columns: list[xr.Dataset] = []
    for name, size in BATCHES.items():
        for window, steps in ((30, DIGIT_STEPS), (100, DIGIT_STEPS[::3])):
            for weight, scores in digit_scores(size, window, steps).items():
                late = scores["slope"].sel(step=scores["step"] > EARLY)
                cells = (spread(scores["correlation"]), spread(scores["slope"]), spread(late))
                summary.add_row(name, str(window), str(weight), *map(escape, cells))
                if window == 30:
                    detail.add_column(f"{name}, {weight}")
                    columns.append(scores)
    for step in DIGIT_STEPS:
        cells = [scores.sel(step=step) for scores in columns]
        detail.add_row(str(step), *(f"{float(c['correlation']):.3f}, {float(c['slope']):.2f}" for c in cells))
    console.print(detail, summary)


def digit_scores(size: int, window: int, steps: Sequence[int]) -> dict[float, xr.Dataset]:
    """By weight of the classes."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, order = Path(folder) / "checkpoints", digit_run.batch_order(size)
        digit_run.record(checkpoints, size, steps)
        own, options = digit_run.task(), {"window": window, "order": order}
        exact = sw.window_influence(own, checkpoints, **options)
        return {w: compared(exact, sw.window_ablation(own, checkpoints, weight=w, **options)) for w in (0.95, 0.8)}


PICKED, DRAWS = 20, 8


def samples() -> None:
    """Windows of 30 updates without the samples called most helpful or harmful, and without others like them."""
    steps = [DIGIT_STEPS[k] for k in (0, 6, 12, 18, 24, 31)]
    table = Table(
        *("run", "step", "without the most", "effect", "predicted", "random", "beyond two standard errors"),
        title=escape(f"digits: {PICKED} of 1,200 samples left out of a window, means over queries"),
    )
    for name, size in BATCHES.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoints, order = Path(folder) / "checkpoints", digit_run.batch_order(size)
            digit_run.record(checkpoints, size, steps)
            own, options = digit_run.task(), {"window": 30, "order": order}
            exact = sw.window_influence(own, checkpoints, per="sample", **options)
            proof = sw.extremes_ablation(own, checkpoints, exact, count=PICKED, draws=DRAWS, **options)
        beyond = proof["difference"] * xr.DataArray([1, -1], dims="side") > 2 * proof["difference_stderr"]
        for step in steps:
            for side in proof["side"].values:
                at = proof.sel(step=step, side=side)
                means = [f"{float(at[n].mean()):.4f}" for n in ("effect", "predicted", "random")]
                share = f"{int(beyond.sel(step=step, side=side).sum())} of {beyond.sizes['query']}"
                table.add_row(name, str(step), str(side), *means, share)
    console.print(table)


# Problems of held_out.py

WINDOW, WEIGHT, FRESH = 20, 0.95, 32
MEASURED_ORDERS, PREDICTED_ORDERS = 16, 4


def patches(activation: type[nn.Module] = nn.ReLU) -> Problem:
    """Which of two photographs a patch is from; groups are thirds of its brightness. Two convolutions.

    The gradient of a network with kinks jumps, and no second derivative knows of that: a smooth one stands beside it.
    """
    size, generator = 12, np.random.RandomState(0)
    cut = [extract_patches_2d(image, (size, size), max_patches=450, random_state=generator) for image in photographs()]
    pixels = np.concatenate(cut).transpose(0, 3, 1, 2) / 255
    target = np.repeat([0, 1], [len(part) for part in cut])
    brightness = thirds(pixels.mean((1, 2, 3)))
    groups = [f"{('china', 'flower')[c]}, {third}" for c, third in zip(target, brightness, strict=True)]
    return Problem(pixels, target, groups, partial(convolutions, activation), cross_entropy, batch_size=FRESH)


def photographs() -> list[np.ndarray[Any, Any]]:
    return list(load_sample_images().images)


def convolutions(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), activation(), nn.Conv2d(8, 16, 3, stride=2), activation(), nn.Flatten(), nn.Linear(256, 2)
    )


def problems() -> None:
    """Every problem under every optimiser."""
    columns = ("run", "own batches: r", "slope", "fresh batches: r", "slope", "coverage")
    table = Table(*columns, title=escape(f"held-out, W = {WINDOW}, weight {WEIGHT}: median [range] over checkpoints"))
    for name, make in (PROBLEMS | {"patches": patches, "patches, GELU": partial(patches, nn.GELU)}).items():
        for optimiser in OPTIMISERS:
            cells = [*own_batches(make(), optimiser), *fresh_batches(make(), optimiser)]
            table.add_row(f"{name}, {optimiser}", *map(escape, cells))
    console.print(table)


def own_batches(problem: Problem, optimiser: str) -> tuple[str, str]:
    """R and slope with the batches of the run, which are known: there is no doubt to cover."""
    with tempfile.TemporaryDirectory() as folder:
        own, order = recorded(problem, optimiser, Path(folder))
        options = {"window": WINDOW, "steps": held_out.STEPS, "order": order}
        exact = sw.window_influence(own, folder, **options)
        scores = compared(exact, sw.window_ablation(own, folder, weight=WEIGHT, **options))
    return spread(scores["correlation"]), spread(scores["slope"])


def fresh_batches(problem: Problem, optimiser: str) -> tuple[str, str, str]:
    """The same of minibatches that were not recorded, and how often the stated intervals hold."""
    with tempfile.TemporaryDirectory() as folder:
        own, _ = recorded(replace(problem, batch_size=FRESH), optimiser, Path(folder))
        options = {"window": WINDOW, "steps": held_out.STEPS}
        exact = sw.window_influence(own, folder, **options)
        measured = sw.window_ablation(own, folder, weight=WEIGHT, repeats=MEASURED_ORDERS, seed=1, **options)
    scores, reach = compared(exact, measured), welch_reach(PREDICTED_ORDERS, MEASURED_ORDERS)
    held = coverage(sw.predicted_effect(exact, WEIGHT), measured, reach)
    return spread(scores["correlation"]), spread(scores["slope"]), spread(held)


def recorded(problem: Problem, optimiser: str, folder: Path) -> tuple[sw.Task, sw.BatchOrder]:
    own = held_out.task(problem, 0)
    order = sw.BatchOrder(len(own.train), problem.batch_size, 0)
    held_out.record(own, optimiser, order, folder)
    return own, order


def welch_reach(*counts: int) -> float:
    """Standard errors to the end of a 95 % interval for the difference of two means, of so many orders alike."""
    shares = 1 / np.array(counts)
    freedom = shares.sum() ** 2 / (shares**2 / (np.array(counts) - 1)).sum()
    return float(stats.t.ppf(0.975, freedom))


# Smaller and smaller changes

SMALL = (0.95, 0.99, 0.999, 0.9999, 0.999999)
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh)


class InDouble(nn.Module):
    """Of what a network in float64 is given."""

    def forward(self, x: Tensor) -> Tensor:
        """The same, in float64."""
        return x.double()


def limit() -> None:
    """Diabetes with Adam, where changes of 5 % are furthest from small: how far is first order from them?"""
    table = Table("activation", "weight", "r", "slope", title=escape("diabetes, Adam, float64: median [range]"))
    for activation in ACTIVATIONS:
        problem = replace(held_out.diabetes(), network=partial(hidden, activation))
        with tempfile.TemporaryDirectory() as folder:
            own, order = recorded(problem, "Adam", Path(folder))
            options = {"window": WINDOW, "steps": held_out.STEPS, "order": order}
            exact = sw.window_influence(own, folder, **options)
            for weight in SMALL:
                scores = compared(exact, sw.window_ablation(own, folder, weight=weight, **options))
                cells = (spread(scores["correlation"]), spread(scores["slope"]))
                table.add_row(activation.__name__, f"{weight:g}", *map(escape, cells))
    console.print(table)


def hidden(activation: type[nn.Module]) -> nn.Module:
    """The network of the problem, but for its activation and precision."""
    return nn.Sequential(
        InDouble(), nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), activation(), nn.Linear(16, 1)
    ).double()


# Language model

SEQUENCES, HELD_OUT, CONTEXT, VOCABULARY, BATCH = 8192, 256, 64, 512, 32
LANGUAGE_STEPS, LANGUAGE_END = (20, 60, 200, 600), 630
CHECKED_STEP = 600
LANGUAGE_COLUMNS = ("step", "r", "slope", "seconds of 8 query groups")


@dataclass(frozen=True, eq=False)
class Text:
    """Sequences to train on and held-out ones, and the class of every token that is predicted in them."""

    train: Tensor
    held_out: Tensor
    train_classes: Tensor
    held_out_classes: Tensor

    @classmethod
    def of_library(cls) -> Text:
        sequences, names = tokenised(standard_library(), VOCABULARY, CONTEXT)
        chosen = sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))]
        train, held = chosen[:SEQUENCES], chosen[SEQUENCES : SEQUENCES + HELD_OUT]
        return cls(train, held, names[train[:, 1:]], names[held[:, 1:]])

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """The class of every predicted training token, in words."""
        return np.array(CLASSES)[self.train_classes.numpy()]

    def task(self, queries: Sequence[str] = CLASSES) -> sw.Task:
        """Next-token prediction; one query set for each class."""
        return sw.Task(
            LanguageModel(VOCABULARY, 64, 2, 4, CONTEXT, tied=False).eval(),
            token_losses,
            train=(self.train,),
            queries=dict.fromkeys(queries, (self.held_out, self.held_out_classes)),
            query_losses={name: class_loss(CLASSES.index(name)) for name in queries},
            objective="tokens",
            forward_batch=256,
        )


def record_language(own: sw.Task, folder: Path) -> None:
    """Train as anybody would, and say which samples every update used."""
    model = copy.deepcopy(own.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    recorder = sw.Recorder(folder, model, optimizer, (*LANGUAGE_STEPS, LANGUAGE_END), batch_size=BATCH)
    order = sw.BatchOrder(len(own.train), BATCH, 0)
    for step in range(LANGUAGE_END):
        optimizer.zero_grad()
        token_losses(model, own.train.batch(order(step))).mean().backward()
        optimizer.step()
        recorder(step + 1, order(step))


def language() -> None:
    """Classes of tokens against one another; and their influence again, as the sum of that of their tokens."""
    text = Text.of_library()
    own, table = text.task(), Table(*LANGUAGE_COLUMNS, title="language model, W = 30, weight 0.8")
    with tempfile.TemporaryDirectory() as folder:
        record_language(own, Path(folder))
        for step in LANGUAGE_STEPS:
            options = {"window": 30, "steps": [step], "groups": text.labels}
            start = time.perf_counter()
            exact = sw.window_influence(own, folder, **options)
            seconds = time.perf_counter() - start
            scores = compared(exact, sw.window_ablation(own, folder, weight=0.8, **options))
            table.add_row(
                str(step), *(f"{scores[name].item():.3f}" for name in ("correlation", "slope")), f"{seconds:.0f}"
            )
            if step == CHECKED_STEP:
                apart = token_sums(text, Path(folder), exact)
        console.print(table)
        console.print(f"step {CHECKED_STEP}: sums over tokens differ from groups by {apart:.1e} of the largest")


def token_sums(text: Text, folder: Path, exact: xr.Dataset) -> float:
    """How far the sum of the influence of the tokens of every class is from that of the class."""
    query = CLASSES[0]
    tokens = sw.window_influence(text.task([query]), folder, window=30, steps=[CHECKED_STEP], per="token")
    sums = tokens["value"][0, :, 0].groupby(xr.DataArray(text.labels.flatten(), dims="train")).sum()
    groups = (exact["value"] * exact["train_size"]).isel(step=0).sel(query=query)
    return float(abs(sums.values - groups.sortby("train").values).max() / abs(groups).max())


# Cost

COST_WINDOW, COST_STEP, REPEATS = 30, 20, 3


def cost() -> None:
    """Whole calls and whole loops by turns, median and range; the first are not counted."""
    torch.set_num_threads(1)
    text = Text.of_library()
    cases: dict[str, tuple[Callable[[int], sw.Task], int, Any]] = {
        **{f"digits, {name}": (digit_task, size, None) for name, size in BATCHES.items()},
        "language model": (lambda groups: text.task(CLASSES[:groups]), BATCH, text.labels),
    }
    columns = ("run", "query groups", "training, s", "influence / training", "with the checks of a new checkpoint")
    table = Table(*columns, title=f"cost, W = {COST_WINDOW}, one thread")
    for name, (make, batch, labels) in cases.items():
        for groups in (1, 8):
            training, influence, checked = seconds_of(make(groups), batch, labels)
            ratios = (spread(xr.DataArray(seconds / training)) for seconds in (influence, checked))
            table.add_row(name, str(groups), f"{np.median(training):.3f}", *map(escape, ratios))
    console.print(table)


def digit_task(groups: int) -> sw.Task:
    """The digits with so many query groups."""
    own = digit_run.task()
    train, held = own.train.batch(slice(None)), own.queries["held-out"].batch(slice(None))
    labels = {"held-out": [label % groups for label in held[1].tolist()]}
    queries = {"held-out": held}
    return sw.Task(
        own.model, own.loss, train=train, queries=queries, train_groups=train[1].tolist(), query_groups=labels
    )


def seconds_of(own: sw.Task, batch: int, labels: Any) -> np.ndarray[Any, Any]:
    """Of the window's own training, of its influence, and of that at a checkpoint which was not checked ``(3, turn)``.

    A new checkpoint costs a pass over all data.
    """
    order = sw.BatchOrder(len(own.train), batch, 0)
    start = list(train_and_record(own, sw.Optimizer("adam", 1e-3, batch_size=batch), order, [COST_STEP]))
    run = sw.Trajectory.from_checkpoints(start)

    def influence() -> None:
        sw.window_influence(own, run, window=COST_WINDOW, order=order, groups=labels, mode="reverse")

    def checked() -> None:
        own.checked -= {known for known in own.checked if known not in ("model", "curvature", "steady")}
        influence()

    calls, seconds = (lambda: plain_training(own, order), influence, checked), []
    for _ in range(1 + REPEATS):
        for call in calls:
            begun = time.process_time()
            call()
            seconds.append(time.process_time() - begun)
    return np.array(seconds).reshape(-1, len(calls))[1:].T


def plain_training(own: sw.Task, order: sw.BatchOrder) -> None:
    """The window as a loop of torch's own."""
    model = copy.deepcopy(own.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(COST_STEP, COST_STEP + COST_WINDOW):
        optimizer.zero_grad()
        own.loss(model, own.train.batch(order(step))).mean().backward()
        optimizer.step()


# Memory

MEMORY_WINDOW = 30


def memory() -> None:
    """One query group of a transformer with random weights and moments, from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        own = large_task(Path(folder))
        begun = time.perf_counter()
        sw.window_influence(own, folder, window=MEMORY_WINDOW, repeats=1, mode="reverse", scratch=folder)
    size = sum(tensor.numel() for tensor in own.trainable.values())
    console.print(
        f"memory, W = {MEMORY_WINDOW}: {size / 1e6:.0f} million parameters, peak of the process {peak():.1f} GB, "
        f"{MEMORY_WINDOW} states of {3 * 4 * size / 1e9:.2f} GB on disk, {time.perf_counter() - begun:.0f} seconds"
    )


def large_task(folder: Path) -> sw.Task:
    """Batches of 8 x 128 random tokens; its checkpoint goes to the folder."""
    generator = torch.Generator().manual_seed(0)
    model = LanguageModel(50_000, 512, 14, 8, 128, tied=True).eval()
    tokens = torch.randint(50_000, (68, 129), generator=generator)
    own = sw.Task(
        model,
        token_losses,
        train=(tokens[:64],),
        queries={"held-out": (tokens[64:],)},
        train_groups=["first", "second"] * 32,
        forward_batch=2,
    )
    sizes = {name: tensor.shape for name, tensor in own.trainable.items()}
    first = {name: 1e-4 * torch.randn(size, generator=generator) for name, size in sizes.items()}
    second = {name: 1e-8 * torch.rand(size, generator=generator) for name, size in sizes.items()}
    rule = sw.Optimizer("adam", 1e-4, batch_size=8)
    write_checkpoint(folder, sw.Checkpoint(100, own.state(), rule, first_moment=first, second_moment=second))
    return own


def peak() -> float:
    """Most memory the process has had, in GB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


PARTS: dict[str, Callable[[], None]] = {
    "digits": digits,
    "samples": samples,
    "held-out": problems,
    "small changes": limit,
    "language model": language,
    "cost": cost,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact influence of a window against retraining it.")
    parser.add_argument("--only", default="", metavar="TEXT", help=f"parts whose name holds TEXT: {', '.join(PARTS)}")
    only = parser.parse_args().only
    for name, part in PARTS.items():
        if only in name and (only or name != "memory"):
            start = time.perf_counter()
            part()
            console.print(f"{name}: {time.perf_counter() - start:.0f} seconds\n")


if __name__ == "__main__":
    main()
