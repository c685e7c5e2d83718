"""Influence in two times: of what is trained on at time t, on what the model knows at a later time T.

The exact derivative of the run, resolved by when data are trained on: adjoints start at every T that is asked for and
walk back to the start of the run, all of them together; what lies between two edges of ``bins`` is summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.derivatives import group_gradients
from stagewise.evaluate import in_any_mode
from stagewise.groups import Groups, Labels, query_groups
from stagewise.retraining.adjoint import Adjoint, Replay, step_back
from stagewise.retraining.horizon import masked
from stagewise.retraining.losses import Progress
from stagewise.retraining.schedule import LearningRate, Order
from stagewise.retraining.start import check_moves, check_order, check_steps, start_at
from stagewise.retraining.training import weights_of
from stagewise.stacking import BatchingChoice
from stagewise.task import Task
from stagewise.varied import Per, varied

DIMS = ("trained", "asked", "train", "query")


@in_any_mode
def influence_in_time(
    task: Task,
    start: Checkpoint,
    order: Order,
    asked: Sequence[int],
    *,
    bins: Sequence[int] | None = None,
    per: Per = "group",
    groups: Labels | None = None,
    learning_rate: LearningRate | None = None,
    check: bool = True,
    memory: float = 4e9,
    scratch: str | Path | None = None,
    batching: BatchingChoice = "auto",
    progress: Progress | None = None,
) -> xr.Dataset:
    """Exact influence of what is trained on at one time on what is lost at another.

        value[t, T, i, j] = d (mean loss of query group j at T) / d (weight of group i in the updates of bin t) / (its
        size)

    What is trained on from T on has no influence at T: 0, exactly. Bins that cover the run sum to
    :func:`unrolled_influence`, and the last bin before T is the :func:`window_influence` of that window. A sample's
    influence on itself is in it. Learning rates are those that :func:`stagewise.retraining.leave_out.retrain` explains.

    Derivatives can grow along unstable stretches of training until they say nothing about any change that can be
    made. Unless ``check`` is off, training is repeated for every bin with the weights of all groups changed, each up
    or down at random, by 1 % and by 10 %; where the derivative misses both effects on the queries by more than 10 %,
    the number is not given. It takes four replays for every bin.

    Args:
        task: the model, its losses and data.
        start: where the replay starts, with optimiser and optimiser state; at step 0 the state is empty.
        order: the samples of every update.
        asked: the steps T at which the queries are asked, ascending, after ``start.step``.
        bins: edges of the bins of t, ascending: bin k holds the updates ``bins[k] <= t < bins[k + 1]``. Every step in
            ``asked`` is an edge or comes after the last. Default: ``start.step`` and ``asked``.
        per: influence of each train group, each candidate, or each token of the candidates.
        groups: label of every training sample, or of every token ``(samples, tokens)``; default ``task.train_groups``,
            or every candidate alone if there are at most 64. With ``per="group"`` only.
        learning_rate: of the update made at ``step``; default: the run's own where known
            (``Checkpoint.coming_rates``), else the checkpoint's, held.
        check: whether numbers are held against retraining, and left out where they fail.
        memory: bytes that replayed states and adjoints may take, beside the model, its data and one gradient. With less
            memory more updates are made again, and queries wait for one another.
        scratch: folder on a disk for the states that memory does not hold, in place of making updates again; at most
            half of what is free there. Nothing stays in it.
        batching: whether adjoints share a product: ``"stacked"``, ``"loop"``: one by one, ``"auto"``: stacked if the
            model allows it.
        progress: called with (walks done, walks in all); with enough memory there is one walk.

    Returns:
        ``value`` ``(trained, asked, train, query)``, nats per unit weight of one sample (token) in all updates of the
        bin. Negative is helpful; NaN where the check failed, of which the attribute ``masked`` tells.
        ``growth`` ``(trained, asked, query)``: the length of the derivative by the weights at the beginning of the
        bin, over that at T; NaN where there is none. ``miss`` ``(trained, asked)``: relative error of the check. The
        coordinate ``trained`` is the first step of each bin, ``trained_stop`` the first after it; ``train_size`` and
        ``query_size``.

    Raises:
        ValueError: the steps or bins do not fit, the order does not fit the data or the checkpoint, the checkpoint
            lacks what its optimizer needs, its learning rate is 0 and held, an operation has no second derivative,
            there are no groups, or ``per`` and ``groups`` exclude one another.
        CheckpointError: the checkpoint is of another model.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> exact = sw.influence_in_time(task, start, sw.BatchOrder(4), [5, 10], bins=[0, 2, 5, 10])
        >>> exact.value.dims, exact.value.shape, exact.trained_stop.values.tolist()
        (('trained', 'asked', 'train', 'query'), (3, 2, 2, 1), [2, 5, 10])
    """
    if memory <= 0:
        raise ValueError(f"need memory > 0, got {memory}")
    steps = check_steps(start, asked)
    spans, trained, queried = (
        _spans(start.step, steps, bins),
        varied(task, per, groups),
        query_groups(task),
    )
    origin = start_at(task, start, curvature=True)
    check_moves(origin, learning_rate)
    check_order(origin, order)
    way = origin.decided(batching, len(steps) * len(queried))
    replay = Replay(
        origin,
        order,
        range(start.step, steps[-1]),
        memory,
        way,
        learning_rate,
        None if scratch is None else Path(scratch),
    )
    stacks, parts = list(_stacks(steps, queried, replay.at_once)), []
    for done, stack in enumerate(stacks, start=1):
        parts.append(_walk(replay, stack, spans, trained))
        if progress is not None:
            progress(done, len(stacks))
    slopes, growth = (_by_step(torch.cat(part, 1), len(steps)) for part in zip(*parts, strict=True))
    slopes = slopes.movedim(-1, 2)
    found = _dataset(slopes / torch.tensor(trained.sizes)[:, None], growth, spans, steps, trained, queried)
    return masked(found, slopes, replay, trained, spans) if check else found


def _spans(start: int, asked: Sequence[int], bins: Sequence[int] | None) -> list[range]:
    """The updates of every bin.

    Raises:
        ValueError: edges do not ascend, lie outside the run, or a step that is asked for is within or before the bins.
    """
    edges = [start, *asked] if bins is None else list(bins)
    if asked[0] <= start:
        raise ValueError(f"asked must come after the start of the replay, step {start}, got {list(asked)}")
    if len(edges) < 2 or edges != sorted(set(edges)) or edges[0] < start or edges[-1] > asked[-1]:
        raise ValueError(
            f"bins must be two edges or more that ascend without repeats from the start of the replay, step {start}, "
            f"to the last step that is asked for, {asked[-1]}; got {edges}"
        )
    if asked[0] <= edges[0]:
        raise ValueError(
            f"step {asked[0]} is asked for, but bins begin at {edges[0]}: nothing in them is trained on before it; "
            "begin them earlier, or ask later"
        )
    if cut := [step for step in asked if step < edges[-1] and step not in edges]:
        raise ValueError(f"step {cut[0]} is asked for in the middle of a bin; add {cut[0]} to bins, {edges}")
    return [range(first, stop) for first, stop in pairwise(edges)]


def _stacks(asked: Sequence[int], queried: Groups, size: int) -> Iterator[dict[int, Groups]]:
    """The query groups of every step, the last step first, cut to so many adjoints at once."""
    rows = [(step, row) for step in reversed(asked) for row in range(len(queried))]
    for first in range(0, len(rows), size):
        stack: dict[int, list[int]] = {}
        for step, row in rows[first : first + size]:
            stack.setdefault(step, []).append(row)
        yield {step: queried.chosen(slice(chosen[0], chosen[-1] + 1)) for step, chosen in stack.items()}


def _walk(
    replay: Replay, stack: Mapping[int, Groups], spans: Sequence[range], trained: Groups
) -> tuple[Tensor, Tensor]:
    """One walk back from the last step of a stack, which the queries of earlier steps join when it passes them.

    Returns:
        Derivatives by the weight of each group in each bin ``(bin, adjoint, train)``, and the growth of the adjoints
        ``(bin, adjoint)``; float64, on the CPU, adjoints in the order of the stack.
    """
    rows, places = sum(map(len, stack.values())), trained.places(len(replay.start.task.train))
    sums = torch.zeros(len(spans), rows, len(trained) + 1, dtype=torch.float64)
    growth = torch.full((len(spans), rows), torch.nan, dtype=torch.float64)
    bin_of = {step: number for number, span in enumerate(spans) for step in span}
    adjoint, length = None, torch.zeros(0, dtype=torch.float64)
    for step, state in replace(replay, span=range(replay.span.start, max(stack))).states():
        if adjoint is not None:
            by_weight = step_back(replay, state, step, adjoint).by_weight
            if step in bin_of:
                begun, where = sums[bin_of[step], : len(by_weight)], places[replay.order(step)]
                where = weights_of(by_weight[0], where).expand_as(by_weight[0]).flatten()
                begun.index_add_(1, where, by_weight.cpu().double().flatten(1))
                # Bins are passed from their end to their beginning: what stays is the latter.
                growth[bin_of[step], : len(by_weight)] = _lengths(adjoint) / length
        if step in stack:
            adjoint = _joined(adjoint, group_gradients(replay.start.point, state.params[0], stack[step]))
            length = torch.cat([length, _lengths(adjoint)[len(length) :]])
        if step == spans[0].start:
            break
    return sums[..., :-1], growth


def _joined(adjoint: Adjoint | None, gradients: Tensor) -> Adjoint:
    """The adjoints under way, and those of queries that are asked here."""
    new = Adjoint.of(gradients)
    return new if adjoint is None else Adjoint(*(torch.cat(pair) for pair in zip(adjoint, new, strict=True)))


def _lengths(adjoint: Adjoint) -> Tensor:
    lengths: Tensor = adjoint.params.double().norm(dim=1).cpu()
    return lengths


def _by_step(rows: Tensor, steps: int) -> Tensor:
    """Adjoints ``(bin, adjoint, ...)``, the last step first, as ``(bin, asked, query, ...)``."""
    return rows.reshape(len(rows), steps, -1, *rows.shape[2:]).flip(1)


def _dataset(
    value: Tensor, growth: Tensor, spans: Sequence[range], asked: Sequence[int], trained: Groups, queried: Groups
) -> xr.Dataset:
    coords = {
        "trained": [span.start for span in spans],
        "asked": list(asked),
        "train": list(trained.labels),
        "query": list(queried.labels),
        "trained_stop": ("trained", [span.stop for span in spans]),
        "train_size": ("train", list(trained.sizes)),
        "query_size": ("query", list(queried.sizes)),
    }
    units = {"units": "nats per unit weight"}
    variables = {
        "value": (DIMS, value.numpy(), units),
        "growth": (("trained", "asked", "query"), growth.numpy(), {"of": "the derivative by the weights, from T back"}),
    }
    sign = "negative = helpful: more weight on the training data lowers the query loss"
    return xr.Dataset(variables, coords, {"estimator": "exact influence in two times", **units, "sign": sign})
