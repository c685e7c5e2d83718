"""Groups of samples: how they are named, and the mean loss of each.

Influence and retraining both speak of groups (train group i, query group j); this file is the only place that
decides which samples a label means, so that a prediction and its measurement can be compared label by label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagewise.task import Task

Labels = Sequence[Any] | np.ndarray[Any, Any]
"""One label per sample: names, numbers, an array or a tensor."""

TRAIN = "/train"
"""The training set, as the data set of a group: a name that no query set can have, also not one called "train"."""

_LARGEST_LEAVE_ONE_OUT = 64


@dataclass(frozen=True, eq=False)
class Groups:
    """Named groups of samples; a group lies in one data set.

    Attributes:
        labels: one name per group.
        datasets: the data set of each group: ``TRAIN``, or the name of a query set.
        indices: the samples of each group, ascending, as indices into its data set.
        tokens: where groups are of tokens, how many a sample has: token t of sample i has the index i * tokens + t.
            0 for groups of samples.
    """

    labels: tuple[str, ...]
    datasets: tuple[str, ...]
    indices: tuple[Tensor, ...]
    tokens: int = 0

    def __post_init__(self) -> None:
        label, count = Counter(self.labels).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} groups are called {label!r}; rename the query set or its labels")

    @classmethod
    def of_labels(cls, labels: Labels, dataset: str) -> Groups:
        """The groups of samples that share a label; numbers in numeric order, then names."""
        names = words(labels)
        distinct = sorted(set(names.tolist()), key=_natural)
        indices = tuple(torch.from_numpy(np.flatnonzero(names == label)) for label in distinct)
        return cls(tuple(distinct), (dataset,) * len(distinct), indices)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples, or of tokens, in each group."""
        return tuple(len(index) for index in self.indices)

    def chosen(self, rows: slice) -> Groups:
        """Some of the groups."""
        return Groups(self.labels[rows], self.datasets[rows], self.indices[rows], self.tokens)

    def places(self, n: int) -> Tensor:
        """The group of each of ``n`` samples ``(n,)``, or of its tokens ``(n, tokens)``; ``len(self)`` for none."""
        places = torch.full((n * (self.tokens or 1),), len(self))
        places[torch.cat(self.indices)] = torch.arange(len(self)).repeat_interleave(torch.tensor(self.sizes))
        return places.view(n, self.tokens) if self.tokens else places

    def mean(self, losses: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Weighted mean over each group of the sample losses.

        Args:
            losses: by data set, shape ``(..., samples)``.
            weights: by data set, shape ``(samples,)``; default all alike.

        Returns:
            ``(..., groups)``, in the units of the losses; 0 for a group without any weight.
        """
        means = []
        for dataset, index in zip(self.datasets, self.indices, strict=True):
            chosen = losses[dataset][..., index]
            share = torch.ones(len(index), dtype=torch.float64) if weights is None else weights[dataset][index]
            share = (share / share.sum().clamp(min=1e-30)).to(chosen)
            means.append((chosen * share).sum(-1))
        return torch.stack(means, -1)


def train_groups(
    task: Task, labels: Labels | None = None, singles: int = _LARGEST_LEAVE_ONE_OUT, *, tokens: bool = False
) -> Groups:
    """Groups of candidates: by ``labels``, else by ``task.train_groups``, else every candidate alone.

    Args:
        task: whose training set.
        labels: of every training sample.
        singles: up to this many candidates are groups of their own where there are no labels.
        tokens: whether labels may be those of every token ``(samples, tokens)``.

    Returns:
        Groups named by label, or by the sample's index; the indices are those of the training set.

    Raises:
        ValueError: not one label per sample, or no labels and too many samples for each to be a group.
    """
    n, candidates = len(task.train), task.candidates
    chosen: Labels | None = task.train_groups if labels is None else labels
    if chosen is None:
        if len(candidates) > singles:
            raise ValueError(
                f"the training set has {len(candidates)} samples and no groups; pass groups=[label of every sample] or "
                f"Task(train_groups=...), or name up to {singles} samples with Task(candidates=...)"
            )
        chosen = range(n)
    if (count := len(chosen)) != n:
        raise ValueError(f"groups: expected one label for each of {n} training samples, got {count}")
    if tokens and np.ndim(chosen[0]) == 1:
        return _token_groups(task, chosen)
    groups = Groups.of_labels(words(chosen)[candidates.numpy()], TRAIN)
    return Groups(groups.labels, groups.datasets, tuple(candidates[index] for index in groups.indices))


def _token_groups(task: Task, labels: Labels) -> Groups:
    """Groups of the candidates' tokens, from one label for every token ``(samples, tokens)``."""
    tokens = len(labels[0])
    if uneven := [k for k, row in enumerate(labels) if len(row) != tokens]:
        raise ValueError(
            f"groups: expected labels (samples, tokens), got {tokens} for sample 0 and {len(labels[uneven[0]])} for "
            f"sample {uneven[0]}; give tokens that are padding a label of their own"
        )
    candidates = task.candidates
    if isinstance(labels, np.ndarray):
        of_tokens: Labels = labels[candidates.numpy()].reshape(-1)
    else:
        of_tokens = [label for k in candidates.tolist() for label in labels[k]]
    groups = Groups.of_labels(of_tokens, TRAIN)
    places = (candidates[:, None] * tokens + torch.arange(tokens)).flatten()
    return Groups(groups.labels, groups.datasets, tuple(places[index] for index in groups.indices), tokens)


def query_groups(task: Task) -> Groups:
    """Groups of query samples, over all query sets.

    A group is called by its label, ``"name:label"`` where there are several query sets; a query set without
    labels is one group under its own name.
    """
    parts = [_query_set_groups(task, name) for name in task.queries]
    return Groups(
        tuple(label for part in parts for label in part.labels),
        tuple(dataset for part in parts for dataset in part.datasets),
        tuple(index for part in parts for index in part.indices),
    )


def same_label(train_labels: Labels, query_labels: Labels) -> NDArray[np.bool_]:
    """Which train groups and query groups carry the same label, whatever the query set: ``(train, query)``.

    A query group is meant by its whole label or by what follows the first ":" in it, so that ``"val:cat"`` is
    the same as ``"cat"`` (see :func:`query_groups`). A label of one's own that holds a ":" is read the same way:
    ``"big:cat"`` would match the train label ``"cat"`` too. Labels are compared as text.
    """
    train, query = (words(labels) for labels in (train_labels, query_labels))
    bare = np.array([label.split(":", 1)[-1] for label in query.tolist()], dtype=str)
    same: NDArray[np.bool_] = (train[:, None] == query) | (train[:, None] == bare)
    return same


def _query_set_groups(task: Task, name: str) -> Groups:
    labels = task.query_groups[name]
    if labels is None:
        return Groups((name,), (name,), (torch.arange(len(task.queries[name])),))
    prefix = f"{name}:" if len(task.queries) > 1 else ""
    groups = Groups.of_labels(labels, name)
    return Groups(tuple(prefix + label for label in groups.labels), groups.datasets, groups.indices)


def words(labels: Labels) -> NDArray[np.str_]:
    """Labels as text, each on its own: in an array of its kind 1 beside 2.5 would become "1.0".

    Raises:
        ValueError: some are several labels.
    """
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind == "U":
        return labels  # there may be as many as tokens
    if several := [label for label in labels if isinstance(label, list | tuple | np.ndarray) or np.ndim(label) > 0]:
        raise ValueError(f"groups: expected one label for each sample, got {several[0]} for one")
    plain = [label.item() if isinstance(label, Tensor | np.generic) else label for label in labels]
    return np.asarray([str(label) for label in plain], dtype=np.str_)


def _natural(label: str) -> tuple[bool, int, str]:
    number = label.isdecimal()
    return not number, int(label) if number else 0, label
