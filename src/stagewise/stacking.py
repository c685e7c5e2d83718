"""Several places at once or one by one: decided by a rule, so that equal configurations give equal bits.

Stacking saves the work of starting operations, which is most of the work of a small model. A large one gains nothing,
and needs the memory of all places at once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stagewise.data import Batch, Samples
from stagewise.differentiate import differentiable, gradient
from stagewise.evaluate import Batching, Point, over_rows
from stagewise.memory import out_of_memory

BatchingChoice = Literal["auto", "stacked", "loop"]
"""``"auto"``: stacked where that pays and the model allows it, see :func:`decided`."""

# Floating-point operations of the forward passes behind one gradient at one place, up to which stacking pays: measured
# on CPU cores; a GPU starts operations no faster, but computes them a few hundred times faster.
_SMALL = {"cpu": 2e7, "cuda": 1e10}
_MOST_NUMBERS = 2**27  # in the parameters of all places


def decided(point: Point, choice: BatchingChoice, places: int, batch_size: int | None = None) -> Batching:
    """How losses at several places are evaluated.

    Args:
        point: the task at a checkpoint.
        choice: as asked for.
        places: how many there are: chains, replays.
        batch_size: samples per gradient; None or 0: the training set.

    Returns:
        What is asked for. For ``"auto"``: ``"stacked"`` if the model is small, can be traced by ``torch.func.vmap``,
        and gives the same losses and gradients on a few samples; else ``"loop"``.

    Raises:
        torch.OutOfMemoryError: that says nothing of whether the model can be stacked.
    """
    if choice != "auto":
        return choice
    if places == 1 or places * point.vector.size > _MOST_NUMBERS:
        return "loop"
    try:
        return "stacked" if _is_small(point, batch_size) and _is_same(point) else "loop"
    except Exception as error:
        if out_of_memory(error):
            raise
        return "loop"  # whatever keeps a model from being traced; if it is something else the loop meets it too


def _is_small(point: Point, batch_size: int | None) -> bool:
    """Counted on a few samples."""
    train = point.task.train
    rows = train.few()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        point.task.losses(point.state, train.batch(rows, point.task.device))
    samples = min(batch_size or len(train), len(train))
    most = _SMALL.get(point.task.device.type, _SMALL["cuda"])
    return bool(counter.get_total_flops() * samples / len(rows) <= most)


def _is_same(point: Point) -> bool:
    """Whether stacked and one by one are the same, on a few samples of every data set at two places."""
    task, weights = point.task, point.vector.flatten(point.state)
    there, rows = Point(task, point.vector, point.state), torch.stack([weights, 1.01 * weights])
    data: list[tuple[str | None, Samples]] = [(None, task.train), *task.queries.items()]
    return all(_alike(there, rows, d.batch(d.few(), task.device), query) for query, d in data)


def _alike(point: Point, rows: Tensor, batch: Batch, query: str | None) -> bool:
    """Whether losses and their gradients are the same stacked and one by one."""

    def losses(row: Tensor) -> Tensor:
        return torch.stack(point.sample_losses(row, batch, query))

    found = []
    ways: tuple[Batching, ...] = ("stacked", "loop")
    for batching in ways:
        with differentiable(rows) as leaf:
            values = over_rows(losses, leaf, batching)
            found.append((values.detach(), gradient(values[:, 0].sum(), leaf)))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*found, strict=True))
