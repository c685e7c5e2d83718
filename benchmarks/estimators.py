"""Every estimator of what training data do in a window of training, against retraining the window, and what it costs.

    python benchmarks/estimators.py [--only TEXT] [--all]

Its problems, of which --only runs those whose name holds TEXT:

digits            single handwritten digits and their classes; Adam, batches of 64, windows of 30 updates
shapes            the convolutional network of examples/own_model; SGD with momentum, windows of 8
language model    classes of tokens in a small transformer on Python's standard library; Adam, windows of 30

r and slope (measured / predicted) are those of `window_ablation` with weight .95 of every group, over pairs of
different groups; the slope only where the estimate is in nats of a window. LDS is `window_lds`: the rank correlation
over windows with a random half of the samples at weight .5 and the others at 1.5. All are medians [range] over the
checkpoints that the estimator answers. Gradients are its floating-point operations in products of matrices and
convolutions at the first of these, in units of those of the loss and gradient of one sample; seconds are medians per
checkpoint.

Nothing is tuned: apart from windows and seeds, every setting of stagewise is its default. TRAK and EK-FAC are optional
libraries: `make .venv/.installed-baselines`. They, the response, chains, gradients and damped forms know the checkpoint
alone. Exact replay knows the window's batches too, as the measurement does, and so which samples they do not hold;
"exact, any batches" is that of weight at the rate at which samples are drawn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import others
import torch
import xarray as xr
from exact_accuracy import Text, compared, record_language
from held_out import spread
from language import CLASSES, token_losses
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import stagewise as sw
from stagewise.evaluate import spread_rows
from stagewise.studies.digits import training as digit_run

console = Console(width=170)
WEIGHT = 0.95
COLUMNS = ("estimator", "answered", "r", "slope", "LDS", "gradients", "seconds")


@dataclass(eq=False)
class Problem:
    """A recorded run, and its data as estimators are given them: every training sample on its own.

    Attributes:
        name: in words.
        folder: of the checkpoints.
        window: number of updates.
        steps: of the checkpoints that are used.
        task: without train groups, with one query set.
        groups: of every training sample.
        predict: logits, classes and weights of a batch, for EK-FAC.
        order: the run's own batches, where checkpoints have not recorded them.
        traces: of the chains, by step.
        long: rows that take too long on a CPU to be made unless they are asked for.
    """

    name: str
    folder: Path
    window: int
    steps: Sequence[int]
    task: sw.Task
    groups: Sequence[str]
    predict: others.Predict
    order: sw.BatchOrder | None = None
    traces: dict[int, sw.TraceStore] = field(default_factory=dict)
    long: frozenset[str] = frozenset()

    @property
    def run(self) -> sw.Trajectory:
        return sw.Trajectory.from_directory(self.folder)

    @property
    def posterior(self) -> sw.LocalPosterior:
        return sw.LocalPosterior(window=self.window)

    @cached_property
    def measured(self) -> xr.Dataset:
        """Effects of groups."""
        options = {"window": self.window, "steps": self.steps, "order": self.order}
        return sw.window_ablation(self.task, self.folder, weight=WEIGHT, groups=self.groups, **options)

    @cached_property
    def halves(self) -> xr.Dataset | None:
        """Effects of random halves of the samples."""
        options = {"window": self.window, "steps": self.steps, "order": self.order}
        return sw.window_halves(self.task, self.folder, **options)

    def exact(self, step: int, task: sw.Task | None = None, **options: Any) -> xr.Dataset:
        options |= {"window": self.window, "steps": [step], "order": self.order}
        return sw.window_influence(task or self.task, self.folder, per="sample", **options)

    def by_queries(self) -> dict[int, sw.Task]:
        """The task with all queries in one group, and with every query on its own."""
        (name, data), train = next(iter(self.task.queries.items())), others.everything(self.task.train)
        make = partial(sw.Task, self.task.model, self.task.loss, train=train, queries={name: others.everything(data)})
        return {1: make(), len(data): make(query_groups={name: range(len(data))})}

    def sample(self, step: int) -> sw.TraceStore:
        """New chains."""
        out = tempfile.mkdtemp(dir=self.folder.parent)
        self.traces[step] = sw.sample(self.task, self.folder, self.posterior, out=out, steps=[step])
        return self.traces[step]

    def bif(self, step: int, part: Any = "full") -> xr.Dataset:
        """From the chains that there are."""
        return sw.bif(self.traces[step], part=part)

    def by_group(self, influence: xr.Dataset) -> xr.Dataset:
        """Means over the samples of every group, where it is not that of groups already."""
        labels = np.array(self.groups)
        if set(influence["train"].values.tolist()) <= set(labels.ravel().tolist()):
            return influence
        own = xr.DataArray(labels[influence["train"].values.astype(int)], dims="train", name="group")
        mean = influence["value"].groupby(own).mean().rename(group="train")
        names, sizes = np.unique(labels, return_counts=True)
        return xr.Dataset({"value": mean.sel(train=names)}, {"train_size": ("train", sizes)})


# Problems

DIGIT_STEPS = (8, 20, 60, 180, 500, 1500)


def digits(folder: Path) -> Problem:
    """Six checkpoints of the digits study."""
    digit_run.record(folder / "checkpoints", 64, DIGIT_STEPS)
    own = digit_run.task()
    return samples("digits", folder, 30, DIGIT_STEPS, own, digit_run.batch_order(64))


SHAPE_STEPS, SHAPE_WINDOW, SHAPE_BATCH = sw.log_spaced(300, 8, first=10), 8, 40


def shapes(folder: Path) -> Problem:
    """The run of examples/own_model/train.py, with checkpoints at the ends of the windows too."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "own_model"))
    import shapes as example

    torch.manual_seed(0)
    (images, classes), model = example.draw(240, seed=1), example.ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ends = [step + SHAPE_WINDOW for step in SHAPE_STEPS]
    recorder = sw.Recorder(
        folder / "checkpoints", model, optimizer, sorted({*SHAPE_STEPS, *ends}), batch_size=SHAPE_BATCH
    )
    for step in range(1, ends[-1] + 1):
        chosen = torch.randint(len(images), (SHAPE_BATCH,))
        optimizer.zero_grad()
        example.losses(model, (images[chosen], classes[chosen])).mean().backward()
        optimizer.step()
        recorder(step, chosen)
    return samples("shapes", folder, SHAPE_WINDOW, SHAPE_STEPS, example.task(), None)


def samples(
    name: str, folder: Path, window: int, steps: Sequence[int], own: sw.Task, order: sw.BatchOrder | None
) -> Problem:
    """A problem of classified images, grouped by class."""
    query = next(iter(own.queries))
    alone = sw.Task(
        own.model,
        own.loss,
        train=others.everything(own.train),
        queries={query: others.everything(own.queries[query])},
        query_groups={query: own.query_groups[query]},
    )
    groups = [str(label) for label in own.train_groups]
    return Problem(name, folder / "checkpoints", window, steps, alone, groups, predict_class, order)


def predict_class(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    return model(batch[0]), batch[1], torch.ones(len(batch[1]))


LANGUAGE_STEPS = (60, 600)
LONG = frozenset({"response", "BIF", "BIF, odd part", "damped, Gauss-Newton", "damped, Hessian"})
SEEN, ASKED, SAMPLED = 64, 64, 64  # sequences that estimators see, that they are asked about, and that chains follow


@dataclass(eq=False)
class LanguageProblem(Problem):
    """Groups are classes of tokens, and a sample is what one sequence holds of one class.

    The sum of the losses of these samples is that of the sequences, so that estimators of samples become estimators of
    classes of tokens; they see some of the sequences, as evenly spaced as the chains'.
    """

    text: Text | None = None

    @cached_property
    def measured(self) -> xr.Dataset:
        options = {"window": self.window, "steps": self.steps, "groups": self.text.labels}
        return sw.window_ablation(self.text.task(), self.folder, weight=WEIGHT, **options)

    @cached_property
    def halves(self) -> None:
        return None

    def exact(self, step: int, task: sw.Task | None = None, **options: Any) -> xr.Dataset:
        options |= {"window": self.window, "steps": [step], "groups": self.text.labels, "mode": "reverse"}
        return sw.window_influence(task or self.text.task(), self.folder, **options)

    def by_queries(self) -> dict[int, sw.Task]:
        return {count: self.text.task(CLASSES[:count]) for count in (1, len(CLASSES))}

    def sample(self, step: int) -> sw.TraceStore:
        """Of sequences, with the loss of every token."""
        train, held_out = self.text.train, self.text.held_out
        rows = spread_rows(SAMPLED, len(train))
        own = sw.Task(
            self.task.model,
            token_losses,
            train=(train,),
            queries={"held-out": (held_out[spread_rows(SAMPLED, len(held_out))],)},
            candidates=rows,
            objective="tokens",
            forward_batch=256,
        )
        out = tempfile.mkdtemp(dir=self.folder.parent)
        self.traces[step] = sw.sample(own, self.folder, self.posterior, out=out, steps=[step])
        return self.traces[step]

    def bif(self, step: int, part: Any = "full") -> xr.Dataset:
        asked = self.text.held_out_classes[spread_rows(SAMPLED, len(self.text.held_out))]
        queries = {"held-out": np.array(CLASSES)[asked.numpy()]}
        found = sw.bif(self.traces[step], part=part, tokens=True, train_groups=self.text.labels, query_groups=queries)
        names, sizes = np.unique(self.text.labels, return_counts=True)
        counts = dict(zip(names.tolist(), sizes.tolist(), strict=True))
        return found.assign_coords(train_size=("train", [counts[name] for name in found["train"].values.tolist()]))


def language(folder: Path) -> Problem:
    """The transformer of exact_accuracy.py."""
    text = Text.of_library()
    record_language(text.task(), folder / "checkpoints")
    train, labels = pairs(text.train, text.train_classes, SEEN)
    asked, asked_labels = pairs(text.held_out, text.held_out_classes, ASKED)
    alone = sw.Task(
        text.task().model,
        pair_losses,
        train=train,
        queries={"held-out": asked},
        query_groups={"held-out": asked_labels},
        objective="tokens",
        forward_batch=256,
    )
    return LanguageProblem(
        "language model",
        folder / "checkpoints",
        30,
        LANGUAGE_STEPS,
        alone,
        labels,
        predict_token,
        long=LONG,
        text=text,
    )


def pairs(tokens: Tensor, classes: Tensor, count: int) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Of some sequences the tokens, and which of them are predicted and of one class; and the class."""
    rows = spread_rows(count, len(tokens))
    of_class = classes[rows, None] == torch.arange(len(CLASSES))[:, None]  # (sequence, class, token)
    sequence, number = of_class.any(2).nonzero(as_tuple=True)
    return (tokens[rows][sequence], of_class[sequence, number].float()), [CLASSES[k] for k in number.tolist()]


def pair_losses(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return token_losses(model, batch), batch[1]


def predict_token(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    return model(batch[0][:, :-1]), batch[0][:, 1:], batch[1]


PROBLEMS: dict[str, Callable[[Path], Problem]] = {"digits": digits, "shapes": shapes, "language model": language}


# Estimators


def sampled(problem: Problem, step: int) -> xr.Dataset:
    problem.sample(step)
    return problem.bif(step)


def from_checkpoint(estimate: Callable[..., xr.Dataset], problem: Problem, step: int) -> xr.Dataset:
    return estimate(problem.task, problem.folder, problem.posterior, steps=[step])


def along_checkpoints(estimate: Callable[..., xr.Dataset], problem: Problem, step: int) -> xr.Dataset:
    """The influence of the window at its end, from the checkpoints before it, in it and after it."""
    run, end = problem.run, step + problem.window
    if run.load(step).optimizer.name != "sgd":
        raise ValueError("for runs of SGD only")
    part = sw.Trajectory.from_checkpoints(run.load(other) for other in run.steps if step <= other <= end)
    found = estimate(problem.task, part, groups=range(len(problem.task.train)), during=range(step, end))
    return found.sel(step=[end]).assign_coords(step=[step])


def of_others(estimate: Callable[..., xr.Dataset], problem: Problem, step: int) -> xr.Dataset:
    return estimate(problem.task, problem.run.load(step))


@dataclass(frozen=True)
class Row:
    """An estimator, and whether it is in nats of a window."""

    estimate: Callable[[Problem, int], xr.Dataset]
    nats: bool = True


ROWS = {
    "exact replay": Row(lambda problem, step: problem.exact(step)),
    "exact, any batches": Row(lambda problem, step: problem.exact(step, expected=True)),
    "response": Row(partial(from_checkpoint, sw.response_influence)),
    "BIF": Row(sampled),
    "BIF, odd part": Row(lambda problem, step: problem.bif(step, "odd")),
    "damped, Gauss-Newton": Row(partial(from_checkpoint, sw.damped_influence)),
    "damped, Hessian": Row(partial(from_checkpoint, partial(sw.damped_influence, curvature="hessian"))),
    "gradient product": Row(partial(from_checkpoint, sw.gradient_product)),
    "cosine of gradients": Row(partial(of_others, others.cosine), nats=False),
    "TracIn": Row(partial(along_checkpoints, sw.tracin)),
    "SOURCE": Row(partial(along_checkpoints, sw.source)),
    "TRAK": Row(partial(of_others, others.trak), nats=False),
    "EK-FAC": Row(
        lambda problem, step: others.ekfac(problem.task, problem.run.load(step), problem.predict), nats=False
    ),
}
SHARED = {"BIF, odd part": "as BIF"}  # the same chains


@dataclass(frozen=True)
class Answers:
    """What an estimator says at the checkpoints that it answers, why it leaves out others, and the seconds of all."""

    values: dict[int, xr.Dataset]
    seconds: dict[int, float]
    omitted: dict[int, str]

    @property
    def median_seconds(self) -> float:
        return float(np.median(list(self.seconds.values())))


def answers(problem: Problem, row: Row) -> Answers:
    """At every checkpoint by itself.

    Raises:
        ImportError: its library is not installed.
    """
    found = Answers({}, {}, {})
    for step in problem.steps:
        start = time.perf_counter()
        try:
            found.values[step] = row.estimate(problem, step)
        except ValueError as error:
            found.omitted[step] = str(error).split(f"step {step}: ", 1)[-1].split(";")[0]  # the reason, not the advice
        found.seconds[step] = time.perf_counter() - start
    return found


def gradients(problem: Problem, row: Row, step: int) -> float:
    """Operations of the estimate over those of the loss and gradient of one sample."""
    few = problem.task.train.batch(slice(0, 32))
    place = {k: v.requires_grad_(k in problem.task.trainable) for k, v in problem.task.state().items()}
    return (
        operations(lambda: row.estimate(problem, step))
        / operations(lambda: problem.task.sample_losses(place, few)[0].mean().backward())
        * 32
    )


def operations(call: Callable[[], object]) -> int:
    """In products of matrices and convolutions."""
    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def convolution_backward(slope: Any, _input: Any, weight: Any, *rest: Any, **_options: Any) -> int:
    """Either gradient costs what the convolution does; torch's own count takes many models at once for one large."""
    wanted = rest[7]
    return int(sum(wanted[:2]) * 2 * np.prod(slope) * np.prod(weight[1:]))


# Tables


def cells(problem: Problem, name: str, found: Answers) -> list[str]:
    """A row of the table."""
    row, answered = ROWS[name], f"{len(found.values)} of {len(problem.steps)}"
    seconds = SHARED.get(name) or f"{found.median_seconds:.3g}"
    if not found.values:
        return [name, answered, "-", "-", "-", "-", seconds]
    scores = compared(xr.concat([problem.by_group(v) for v in found.values.values()], "step"), problem.measured)
    slope = spread(scores["slope"]) if row.nats else "-"
    count = SHARED.get(name) or f"{gradients(problem, row, next(iter(found.values))):,.0f}"
    return [name, answered, spread(scores["correlation"]), slope, lds(problem, found), count, seconds]


def reasons(name: str, omitted: dict[int, str]) -> list[str]:
    """Why an estimator leaves out checkpoints."""
    steps = {reason: [step for step, other in omitted.items() if other == reason] for reason in omitted.values()}
    return [f"{name}, step {', '.join(map(str, which))}: {reason}" for reason, which in steps.items()]


def lds(problem: Problem, found: Answers) -> str:
    """The score of single samples."""
    if problem.halves is None:
        return "-"
    scores = xr.concat(
        [sw.window_lds(value, problem.halves.sel(step=[step])) for step, value in found.values.items()], "step"
    )
    return spread(scores["lds"])


def break_even(problem: Problem, chains: float) -> str:
    """From how many query groups on the chains, which do not depend on their number, cost less than exact replay."""
    (one, task), (many, other) = problem.by_queries().items()
    least, most = (
        answers(problem, Row(lambda problem, step, task=task: problem.exact(step, task))).median_seconds
        for task in (task, other)
    )
    each = (most - least) / (many - one)
    words = f"exact replay: {least:.2g} s with {one} query group, {most:.2g} s with {many}; chains: {chains:.2g} s. "
    if np.isnan(chains):
        return words.split("; chains")[0]
    if chains <= least:
        return words + "Chains cost less from the first query group on."
    if each <= 0:
        return words + "Exact replay costs no more for more query groups: chains never cost less."
    return words + f"Chains cost less from about {one + (chains - least) / each:,.0f} query groups on."


def show(problem: Problem, every: bool) -> None:
    """The table of a problem, and what stands below it."""
    title = f"{problem.name}, W = {problem.window}, steps {', '.join(map(str, problem.steps))}: median [range]"
    table, notes, chains = Table(*COLUMNS, title=escape(title)), list[str](), np.nan
    for name, row in ROWS.items():
        if name in problem.long and not every:
            table.add_row(name, "with --all")
            continue
        try:
            found = answers(problem, row)
        except ImportError:
            table.add_row(name, "not installed")
            continue
        table.add_row(*map(escape, cells(problem, name, found)))
        notes += reasons(name, found.omitted)
        if name == "BIF":
            chains = found.median_seconds
    console.print(table)
    for note in [*notes, break_even(problem, chains)]:
        console.print(note, markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Estimators of a window's influence against retraining, and their cost."
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help=f"problems whose name holds TEXT: {', '.join(PROBLEMS)}"
    )
    parser.add_argument("--all", action="store_true", help="also rows that take long, of the language model")
    options = parser.parse_args()
    for name, make in PROBLEMS.items():
        if options.only in name:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                show(make(Path(folder)), options.all)
            console.print(f"{name}: {time.perf_counter() - start:.0f} seconds\n")


if __name__ == "__main__":
    main()
