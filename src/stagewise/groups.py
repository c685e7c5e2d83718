"""Groups of samples or tokens: how they are named, and the mean loss of each.

Influence and retraining both speak of groups (train group i, query group j); this file is the only place that
decides which samples, or which of their tokens, a label means, so that a prediction and its measurement can be compared
label by label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagewise.data import Samples
from stagewise.labels import NONE, Labels, as_labels, words
from stagewise.task import Task

__all__ = ["TRAIN", "Groups", "Labels", "query_groups", "same_label", "train_groups", "words"]

TRAIN = "/train"
"""The training set, as the data set of a group: a name that no query set can have, also not one called "train"."""

_LARGEST_LEAVE_ONE_OUT = 64


@dataclass(frozen=True, eq=False)
class Groups:
    """Named groups of samples or tokens; a group lies in one data set.

    Attributes:
        labels: one name per group.
        datasets: the data set of each group: ``TRAIN``, or the name of a query set.
        indices: the samples of each group, ascending, as indices into its data set; or its tokens, token t of sample i
            having the index i * tokens + t.
        widths: the data sets whose groups are of tokens, and how many tokens each of their samples has.
    """

    labels: tuple[str, ...]
    datasets: tuple[str, ...]
    indices: tuple[Tensor, ...]
    widths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        label, count = Counter(self.labels).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} groups are called {label!r}; rename the query set or its labels")

    @classmethod
    def of_labels(cls, labels: Labels, dataset: str) -> Groups:
        """The groups of samples that share a label; numbers in numeric order, then names.

        Raises:
            ValueError: nothing has a label.
        """
        each: list[str] = words(labels).tolist()  # there may be as many as tokens: hashing them is faster than sorting
        numbers = {label: number for number, label in enumerate(dict.fromkeys(each))}
        distinct = sorted((label for label in numbers if label != NONE), key=_natural)
        if not distinct:
            raise ValueError(f"{dataset.strip('/')}: no sample or token has a label")
        of_labels = np.array([numbers[label] for label in each])
        order, ends = np.argsort(of_labels, kind="stable"), np.cumsum(np.bincount(of_labels))
        members = dict(zip(numbers, np.split(order, ends[:-1]), strict=True))
        indices = tuple(torch.from_numpy(members[label]) for label in distinct)
        return cls(tuple(distinct), (dataset,) * len(distinct), indices)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples, or of tokens, in each group."""
        return tuple(len(index) for index in self.indices)

    @property
    def tokens(self) -> int:
        """How many tokens a training sample has where its groups are of tokens, else 0."""
        return self.widths.get(TRAIN, 0)

    def chosen(self, rows: slice) -> Groups:
        """Some of the groups."""
        return self._of(range(len(self))[rows])

    def named(self, labels: Sequence[str]) -> Groups:
        """The groups of these labels, in their order.

        Raises:
            ValueError: there are none, or no group has one of them.
        """
        unknown = [label for label in labels if label not in self.labels]
        if unknown or not labels:
            raise ValueError(f"no group is called {unknown or 'nothing'}; there are {list(self.labels)}")
        return self._of([self.labels.index(label) for label in labels])

    def _of(self, rows: Sequence[int]) -> Groups:
        datasets = tuple(self.datasets[k] for k in rows)
        widths = {name: width for name, width in self.widths.items() if name in datasets}
        return Groups(tuple(self.labels[k] for k in rows), datasets, tuple(self.indices[k] for k in rows), widths)

    def places(self, n: int, dataset: str = TRAIN) -> Tensor:
        """Which group each of a data set's ``n`` samples ``(n,)`` is in, or its tokens ``(n, tokens)``.

        ``len(self)`` for none.
        """
        tokens = self.widths.get(dataset, 0)
        places = torch.full((n * (tokens or 1),), len(self))
        for number, (where, index) in enumerate(zip(self.datasets, self.indices, strict=True)):
            if where == dataset:
                places[index] = number
        return places.view(n, tokens) if tokens else places

    def mean(self, losses: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weighted mean over each group of the losses.

        Args:
            losses: by data set, shape ``(..., samples)``, or ``(..., samples * tokens)`` where groups are of tokens.
            weights: by data set, of the last dimension; default all alike.

        Returns:
            ``(..., groups)``, in the units of the losses; 0 for a group without any weight.
        """
        if weights is None and len(set(self.datasets)) == 1 and max(self.sizes) == 1:
            return losses[self.datasets[0]][..., torch.cat(self.indices)]  # there may be as many as tokens
        means = []
        for dataset, index in zip(self.datasets, self.indices, strict=True):
            chosen = losses[dataset][..., index]
            share = torch.ones(len(index), dtype=torch.float64) if weights is None else weights[dataset][index]
            share = (share / share.sum().clamp(min=1e-30)).to(chosen)
            means.append((chosen * share).sum(-1))
        return torch.stack(means, -1)


def train_groups(task: Task, labels: Labels | None = None, singles: int = _LARGEST_LEAVE_ONE_OUT) -> Groups:
    """Groups of candidates, or of their tokens: by ``labels``, else ``task.train_groups``, else every candidate alone.

    Args:
        task: whose training set.
        labels: of every training sample ``(samples,)``, or of every token ``(samples, tokens)``; None for no group.
        singles: up to this many candidates are groups of their own where there are no labels.

    Returns:
        Groups named by label, or by the sample's index; the indices are those of the training set.

    Raises:
        ValueError: not one label per sample or token, or no labels and too many samples for each to be a group.
    """
    n, candidates = len(task.train), task.candidates
    chosen = task.train_groups if labels is None else as_labels(labels, n, "groups")
    if chosen is None:
        if len(candidates) > singles:
            raise ValueError(
                f"the training set has {len(candidates)} samples and no groups; pass groups=[label of every sample] or "
                f"Task(train_groups=...), or name up to {singles} samples with Task(candidates=...)"
            )
        chosen = as_labels(range(n), n, "groups")
    return _labelled(chosen, TRAIN, candidates, task, task.train, None)


def _labelled(
    labels: NDArray[np.str_], dataset: str, rows: Tensor, task: Task, data: Samples, query: str | None
) -> Groups:
    """Groups of some samples of a data set, or of their tokens, by labels of all."""
    groups = Groups.of_labels(labels[rows.numpy()].reshape(-1), dataset)
    if labels.ndim == 1:
        return Groups(groups.labels, groups.datasets, tuple(rows[index] for index in groups.indices))
    width = labels.shape[1]
    _check_width(labels, task, data, query)
    places = (rows[:, None] * width + torch.arange(width)).flatten()
    return Groups(groups.labels, groups.datasets, tuple(places[index] for index in groups.indices), {dataset: width})


def _check_width(labels: NDArray[np.str_], task: Task, data: Samples, query: str | None) -> None:
    """Refuse labels of tokens that are not those of the losses: a shift by one would go unnoticed.

    Raises:
        ValueError: the loss of the longest sample has another number of tokens.
    """
    longest = int(data.sizes.argmax())
    with torch.no_grad():
        values = task.losses(task.state(), data.batch(torch.tensor([longest]), task.device), query)
    got = "one loss per sample" if values.ndim == 1 else f"{values.shape[1]} losses"
    if values.ndim == 1 or values.shape[1] != labels.shape[1]:
        raise ValueError(
            f"{data.name}: there are labels of {labels.shape[1]} tokens in a sample, but the loss returns {got} for "
            f"sample {longest}; give one label for each loss (a model that predicts the next token has no loss for the "
            "first)"
        )


def query_groups(task: Task) -> Groups:
    """Groups of query samples, or of their tokens, over all query sets.

    A group is called by its label, ``"name:label"`` where there are several query sets; a query set without
    labels is one group under its own name.
    """
    if task.grouped_queries is None:
        parts = [_query_set_groups(task, name) for name in task.queries]
        task.grouped_queries = Groups(
            tuple(label for part in parts for label in part.labels),
            tuple(dataset for part in parts for dataset in part.datasets),
            tuple(index for part in parts for index in part.indices),
            {dataset: width for part in parts for dataset, width in part.widths.items()},
        )
    known: Groups = task.grouped_queries
    return known


def same_label(train_labels: Labels, query_labels: Labels, train_sizes: Any = None) -> NDArray[np.bool_]:
    """Which train groups and query groups carry the same label, whatever the query set: ``(train, query)``.

    A query group is meant by its whole label or by what follows the first ":" in it, so that ``"val:cat"`` is
    the same as ``"cat"`` (see :func:`query_groups`). A label of one's own that holds a ":" is read the same way:
    ``"big:cat"`` would match the train label ``"cat"`` too. Labels are compared as text. Where ``train_sizes`` are all
    1 and the labels are numbers, those are of single samples: number 3 has nothing to do with a class called "3".
    """
    train, query = (words(labels) for labels in (train_labels, query_labels))
    if train_sizes is not None and np.equal(train_sizes, 1).all() and np.char.isdecimal(train).all():
        return np.zeros((len(train), len(query)), dtype=bool)
    bare = np.array([label.split(":", 1)[-1] for label in query.tolist()], dtype=str)
    same: NDArray[np.bool_] = (train[:, None] == query) | (train[:, None] == bare)
    return same


def _query_set_groups(task: Task, name: str) -> Groups:
    labels = task.query_groups[name]
    if labels is None:
        return Groups((name,), (name,), (torch.arange(len(task.queries[name])),))
    prefix = f"{name}:" if len(task.queries) > 1 else ""
    data = task.queries[name]
    groups = _labelled(labels, name, torch.arange(len(data)), task, data, name)
    return Groups(tuple(prefix + label for label in groups.labels), groups.datasets, groups.indices, groups.widths)


def _natural(label: str) -> tuple[bool, int, str]:
    number = label.isdecimal()
    return not number, int(label) if number else 0, label
