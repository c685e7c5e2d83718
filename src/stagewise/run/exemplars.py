"""The single training samples that matter most for a query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.utils._pytree import tree_flatten

from stagewise.results import BIF, Exemplar
from stagewise.run.analysis import spread
from stagewise.task import Samples, Task

OfSamples = Callable[[list[int], list[Any]], xr.Dataset]
"""Influence of every candidate on some queries at some steps."""

OfTokens = Callable[[Mapping[int, Sequence[int]], list[Any]], Mapping[int, xr.Dataset]]
"""Influence of every token of the samples picked at each step, called ``sample/token``, on some queries."""

LONGEST = 256
"""Tokens of a sample that are kept: a report is read."""

_CUT = "…"
_LABEL = 120


def chosen(single: xr.Dataset, steps: list[int], queries: list[Any]) -> xr.Dataset:
    """From what is known of every sample."""
    return single.sel(step=steps, query=queries)


def tokens_of(single: xr.Dataset, picked: Mapping[int, Sequence[int]], queries: list[Any]) -> dict[int, xr.Dataset]:
    """From what is known of every token: those of the samples that were picked at each step."""
    of_sample = np.array([int(label.split("/")[0]) for label in single["train"].values.tolist()])
    return {
        step: single.sel(step=[step], query=queries).isel(train=np.flatnonzero(np.isin(of_sample, [*samples])))
        for step, samples in picked.items()
    }


def from_untrusted(exemplar: Exemplar, reasons: Mapping[int, str]) -> bool:
    """Whether it was picked by chains that cannot be trusted, given the steps that have such."""
    return exemplar.estimator == BIF and exemplar.step in reasons


def exemplars(
    task: Task,
    samples: OfSamples,
    influence: xr.Dataset,
    count: int,
    steps: int = 4,
    queries: int = 3,
    of_tokens: OfTokens | None = None,
) -> list[Exemplar]:
    """The most helpful and most harmful training samples of the queries that change most, at a few steps.

    Samples are ranked by value / stderr, so that a large but noisy value does not lead; by value where none is noisy.
    Those of a task with texts come with their tokens, where there is an answer for them.
    """
    if count == 0 or "query" not in influence.dims:
        return []
    chosen = spread(influence["step"].values.tolist(), steps)
    change = abs(influence["value"]).max("train").std("step")
    names = influence["query"].values[np.argsort(-change.values)][:queries].tolist()
    of_samples = samples(chosen, names)
    index = of_samples["train"].values.astype(int)
    found = []
    for query in names:
        for step in chosen:
            cell = of_samples.sel(step=step, query=query)
            value, stderr = cell["value"].values, cell["stderr"].values
            noisy = np.divide(value, stderr, out=np.zeros_like(value), where=stderr > 0)
            ranked = np.argsort(noisy if stderr.any() else value)
            rows = np.concatenate([ranked[:count], ranked[::-1][:count]])
            picked = index[rows].tolist()
            found.append(
                Exemplar(
                    str(query),
                    step,
                    picked,
                    [label_of(task, i) for i in picked],
                    value[rows].tolist(),
                    stderr[rows].tolist(),
                    images(task.train, picked),
                )
            )
    if of_tokens is None or task.train_texts is None:
        return found
    return _with_tokens(task.train_texts, of_tokens, found, names)


def check_texts(task: Task) -> None:
    """Refuse texts that are not those of the losses: a shift by one would go unnoticed.

    Raises:
        ValueError: a sample with texts has another number of losses, and of those that count.
    """
    if task.train_texts is None:
        return
    # Samples of one size are not padded together, so that their batch is as wide as each of them.
    alike: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(task.train.sizes.tolist()):
        alike.setdefault((len(task.train_texts[row]), size), []).append(row)
    for (given, _), rows in alike.items():
        for part in torch.split(torch.tensor(rows), task.forward_batch):
            _check_number(task, part, given)


def _check_number(task: Task, rows: Tensor, given: int) -> None:
    """Are there so many losses, or so many up to the last that counts, of each of these samples."""
    with torch.no_grad():
        losses = task.weighted_losses(task.state(), task.train.batch(rows, task.device))
    shares = task.shares(losses).cpu()
    if shares.ndim == 1:
        wrong, got = rows[:1], "one loss per sample"
    else:
        width = shares.shape[1]
        counted = ((shares > 0) * torch.arange(1, width + 1)).amax(1)
        wrong, got = rows[(counted != given) & (width != given)], f"{width} losses"
    if len(wrong):
        raise ValueError(
            f"train_texts: there are {given} texts of sample {int(wrong[0])}, but the loss returns {got} for it; give "
            "one text for each loss (a model that predicts the next token has no loss for the first)"
        )


def _with_tokens(
    texts: Sequence[Sequence[str]], of_tokens: OfTokens, found: Sequence[Exemplar], queries: list[Any]
) -> list[Exemplar]:
    picked: dict[int, set[int]] = {}
    for exemplar in found:
        picked.setdefault(exemplar.step, set()).update(exemplar.samples)
    by_step = of_tokens({step: sorted(samples) for step, samples in picked.items()}, queries)
    return [_with_passages(exemplar, texts, by_step[exemplar.step]) for exemplar in found]


def _with_passages(exemplar: Exemplar, texts: Sequence[Sequence[str]], influence: xr.Dataset) -> Exemplar:
    column = influence["value"].sel(step=exemplar.step, query=exemplar.query)
    values: dict[int, dict[int, float]] = {}
    for label, value in zip(column["train"].values.tolist(), column.values.tolist(), strict=True):
        sample, token = map(int, label.split("/"))
        values.setdefault(sample, {})[token] = value
    passages = [_passage(texts[sample], values.get(sample, {})) for sample in exemplar.samples]
    return replace(exemplar, texts=[words for words, _ in passages], token_values=[each for _, each in passages])


def _passage(texts: Sequence[str], values: Mapping[int, float]) -> tuple[list[str], list[float]]:
    """The tokens of a sample up to the last that counts; of a long one, the stretch where most influence lies."""
    length = min(len(texts), max(values, default=-1) + 1)
    each = np.array([values.get(token, np.nan) for token in range(length)])
    sums = np.concatenate([[0.0], np.cumsum(abs(np.nan_to_num(each)))])
    first = int(np.argmax(sums[LONGEST:] - sums[:-LONGEST])) if length > LONGEST else 0
    last = min(first + LONGEST, length)
    before, after = [_CUT] * (first > 0), [_CUT] * (last < length)
    rounded = [float(f"{value:.4g}") for value in each[first:last].tolist()]  # files stay small
    words = [*before, *texts[first:last], *after]
    return words, [*[np.nan] * len(before), *rounded, *[np.nan] * len(after)]


def label_of(task: Task, sample: int) -> str:
    """What to call a training sample: its own label, or the beginning of its text."""
    groups = task.train_groups
    if groups is not None and groups.ndim == 1:
        return str(groups[sample])
    return "" if task.train_texts is None else "".join(task.train_texts[sample])[:_LABEL]


def images(samples: Samples, index: Sequence[int]) -> np.ndarray[Any, Any] | None:
    """The samples as pictures, if their first tensor looks like some: (h, w), (1, h, w) or (3, h, w)."""
    leaf = tree_flatten(samples.batch(torch.tensor(list(index))))[0][0]
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return None
    if leaf.ndim == 4 and leaf.shape[1] in (1, 3):
        leaf = leaf.squeeze(1) if leaf.shape[1] == 1 else leaf.permute(0, 2, 3, 1)
    elif leaf.ndim != 3 or min(leaf.shape[1:]) < 4:
        return None
    low, high = leaf.min(), leaf.max()
    return ((leaf - low) / (high - low).clamp(min=1e-12)).double().cpu().numpy()
