"""Recorded runs that estimators of a window's influence are held against: what benchmarks share."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import others
import torch
import xarray as xr
from exact_accuracy import Text, record_language
from language import CLASSES, token_losses
from torch import Tensor

import stagewise as sw
from stagewise.evaluate import spread_rows
from stagewise.studies.digits import training as digit_run

WEIGHT = 0.95


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
    long: frozenset[str] = frozenset()

    @property
    def run(self) -> sw.Trajectory:
        return sw.Trajectory.from_directory(self.folder)

    @property
    def posterior(self) -> sw.LocalPosterior:
        return sw.LocalPosterior(window=self.window)

    @property
    def grouped(self) -> sw.Task:
        """The task of estimators that need not see every sample on its own."""
        return self.task

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

    def chains(self, step: int) -> Path:
        """Where the chains of a checkpoint are kept."""
        return self.folder.parent / f"chains-{step}"

    def sample(self, step: int) -> None:
        """New chains."""
        shutil.rmtree(self.chains(step), ignore_errors=True)
        sw.sample(self.task, self.folder, self.posterior, out=self.chains(step), steps=[step])

    def bif(self, step: int, part: Any = "full") -> xr.Dataset:
        """From the chains that there are."""
        return sw.bif(self.chains(step), part=part)

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


def recorded(folder: Path) -> bool:
    """Whether another process has made the run already."""
    return (folder / "checkpoints").exists()


DIGIT_STEPS = (8, 20, 60, 180, 500, 1500)


def digits(folder: Path) -> Problem:
    """Six checkpoints of the digits study."""
    if not recorded(folder):
        digit_run.record(folder / "checkpoints", 64, DIGIT_STEPS)
    own = digit_run.task()
    return samples("digits", folder, 30, DIGIT_STEPS, own, digit_run.batch_order(64))


SHAPE_STEPS, SHAPE_WINDOW, SHAPE_BATCH = sw.log_spaced(300, 8, first=10), 8, 40


def shapes(folder: Path) -> Problem:
    """The run of examples/own_model/train.py, with checkpoints at the ends of the windows too."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "own_model"))
    import shapes as example

    if not recorded(folder):
        record_shapes(example, folder)
    return samples("shapes", folder, SHAPE_WINDOW, SHAPE_STEPS, example.task(), None)


def record_shapes(example: Any, folder: Path) -> None:
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
    def grouped(self) -> sw.Task:
        """The same sequences as they are, with labels of tokens: a seventh of the passes."""
        seen, asked = spread_rows(SEEN, len(self.text.train)), spread_rows(ASKED, len(self.text.held_out))
        return sw.Task(
            self.task.model,
            token_losses,
            train=(self.text.train[seen],),
            train_groups=self.text.labels[seen],
            queries={"held-out": (self.text.held_out[asked],)},
            query_groups={"held-out": np.array(CLASSES)[self.text.held_out_classes[asked]]},
            objective="tokens",
            forward_batch=16,
        )

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

    def sample(self, step: int) -> None:
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
        shutil.rmtree(self.chains(step), ignore_errors=True)
        sw.sample(own, self.folder, self.posterior, out=self.chains(step), steps=[step])

    def bif(self, step: int, part: Any = "full") -> xr.Dataset:
        asked = self.text.held_out_classes[spread_rows(SAMPLED, len(self.text.held_out))]
        queries = {"held-out": np.array(CLASSES)[asked.numpy()]}
        found = sw.bif(self.chains(step), part=part, tokens=True, train_groups=self.text.labels, query_groups=queries)
        names, sizes = np.unique(self.text.labels, return_counts=True)
        counts = dict(zip(names.tolist(), sizes.tolist(), strict=True))
        return found.assign_coords(train_size=("train", [counts[name] for name in found["train"].values.tolist()]))


def language(folder: Path) -> Problem:
    """The transformer of exact_accuracy.py."""
    text = Text.of_library()
    if not recorded(folder):
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
