"""Is this the task that a run folder was sampled with?

:func:`identity` says what can be said without evaluating anything, part by part. But no text proves that a function is
the same: what counts may be the state of an object, an entry of a table, an attribute of the model, a helper that is
imported late. So numbers stand beside it, :func:`probe`: the losses of a few samples at the checkpoint and away from
it, and how the objective changes along fixed directions, for what changes gradients only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from stagewise.checkpoint import Checkpoint
from stagewise.content import content_digest
from stagewise.data import Samples
from stagewise.derivatives import mean_gradient
from stagewise.evaluate import Point, chunks
from stagewise.labels import TokenClasses
from stagewise.task import Task
from stagewise.vector import ParameterVector

Probe = dict[str, list[float]]
"""Numbers by the part of the task they are of."""

GRADIENT = "gradient of the objective"

_FEW = 8
_AWAY = 0.1  # of the size of a parameter
# A number is the same up to this share of the spread of its kind, and to so many times what the last bits of the
# weights change: devices, libraries and thread counts add in different orders.
_RELATIVE = 1e-4
_ROUNDINGS = 30


def identity(task: Task, text: bool = True) -> dict[str, str]:
    """What a stored number depends on, one hash per part, so that a mismatch can name the part.

    Args:
        task: the task.
        text: whether code is its text, see :func:`stagewise.content.content_digest`.
    """
    parts = {
        "model": content_digest(task.pure.module, text),
        "loss": content_digest(task.loss, text),
        "objective": task.objective,
        "training data": task.train.digest,
        "candidates": content_digest(task.candidates),
    }
    parts |= {f"query {name!r}": data.digest for name, data in task.queries.items()}
    of_tokens = {name: labels for name, labels in task.label_sets.items() if labels is not None and labels.ndim == 2}
    if of_tokens:  # losses are kept by (sample, label)
        parts["labels of tokens"] = content_digest(of_tokens)
    return parts | {f"query loss {name!r}": content_digest(loss, text) for name, loss in task.query_losses.items()}


def probe(task: Task, checkpoint: Checkpoint, *, rounded: bool = False, samples: int = _FEW) -> Probe:
    """Numbers that change when the model or a loss does.

    Args:
        task: the task.
        checkpoint: as :meth:`Task.fitted` returns it.
        rounded: with the last bits of all weights changed, to see what rounding does.
        samples: of how many of every data set the losses are looked at; they are spread over it.

    Returns:
        By data set, the losses of these samples at the checkpoint and at a place away from it; and the derivatives of
        the objective on a few samples, at both places along two directions.
    """
    vector = ParameterVector.of(task)
    point, anchor = Point(task, vector, checkpoint.params), vector.flatten(checkpoint.params)
    size = vector.flatten({name: _size(checkpoint.params[name]) for name in vector.names}, anchor)
    places = [anchor, anchor + _AWAY * size * _noise(anchor, 0)]
    if rounded:
        places = [place * (1 + torch.finfo(place.dtype).eps * _noise(place, 1).sign()) for place in places]
    numbers: Probe = {}
    for name, data, query in _data_sets(task):
        batches = [*chunks(task, data, data.few(samples))]
        with torch.no_grad():
            losses = (point.sample_losses(u, batch, query)[0] for u in places for batch in batches)
            numbers[name] = [loss for values in losses for loss in values.tolist()]
    slopes = [mean_gradient(point, u, task.train, task.train.few(_FEW)) for u in places]
    numbers[GRADIENT] = [float(slope @ (size * _noise(anchor, seed))) for slope in slopes for seed in (2, 3)]
    return numbers


def changes(stored: Probe, now: Probe, rounded: Probe) -> list[str]:
    """The parts whose numbers are no longer the same, beyond what rounding does."""
    return [
        part
        for part in sorted({*stored, *now})
        if part not in stored
        or part not in now
        or not same(np.array(stored[part]), np.array(now[part]), rounding(now[part], rounded[part]))
    ]


def rounding(now: list[float], rounded: list[float]) -> float:
    """How much numbers may differ because the last bits of the weights do."""
    differences = np.abs(np.array(now) - np.array(rounded))
    return _ROUNDINGS * float(differences[np.isfinite(differences)].max(initial=0.0))


def same(stored: NDArray[Any], now: NDArray[Any], noise: float) -> bool:
    """Whether numbers of one kind are the same; those that are not finite are so in both."""
    if stored.shape != now.shape:
        return False
    finite = now[np.isfinite(now)]
    if not finite.size:
        return np.array_equal(stored, now, equal_nan=True)
    single = (finite == finite.astype(np.float32)).all()
    last_bits = 4 * float(np.finfo(np.float32 if single else np.float64).eps) * np.abs(finite).max()
    return np.allclose(stored, now, rtol=0, atol=_RELATIVE * np.ptp(finite) + noise + last_bits, equal_nan=True)


@torch.no_grad()
def all_losses(task: Task, checkpoint: Checkpoint, single_tokens: bool = False) -> dict[str, NDArray[np.float64]]:
    """The losses of the candidates (``"train"``) and of every query set (``"queries/<name>"``) at a checkpoint.

    ``(sample[, token])``; shorter samples are padded with 0. Where tokens have labels and not all are kept single, the
    means by label, as chains keep them.
    """
    sets: dict[str, tuple[Samples, str | None]] = {"train": (task.candidate_samples, None)}
    sets |= {f"queries/{name}": (data, name) for name, data in task.queries.items()}
    found = {}
    for path, (data, query) in sets.items():
        batches = (task.weighted_losses(checkpoint.params, batch, query) for batch in chunks(task, data))
        parts = [(losses.values, task.shares(losses)) for losses in batches]
        width = max(values.shape[-1] if values.ndim == 2 else 0 for values, _ in parts)
        values, shares = (_padded(column, width).double().cpu() for column in zip(*parts, strict=True))
        labels = task.label_sets[path]
        if labels is not None and labels.ndim == 2 and not single_tokens:
            values = TokenClasses.of(labels, shares).means(values)
        found[path] = values.numpy()
    return found


def _padded(parts: Sequence[Tensor], width: int) -> Tensor:
    return torch.cat([pad(part, (0, width - part.shape[-1])) if width else part for part in parts])


def part_of(path: str) -> str:
    """The name of a data set's part, from its path in a cell."""
    return "training data" if path == "train" else f"query {path.removeprefix('queries/')!r}"


def _data_sets(task: Task) -> Iterator[tuple[str, Samples, str | None]]:
    """Every data set under the name of its part, and whose loss is measured on it."""
    yield "training data", task.train, None
    for name, data in task.queries.items():
        yield f"query {name!r}", data, name


def _size(tensor: Tensor) -> Tensor:
    """Of a parameter's entries, for each of them."""
    return (tensor.square().mean().sqrt() + 0.01).expand(tensor.shape)


def _noise(like: Tensor, seed: int) -> Tensor:
    """The same numbers in every process and on every device."""
    return torch.randn(len(like), generator=torch.Generator().manual_seed(seed)).to(like)
