"""Retraining on changed data from one start: what would the queries have lost, had the data been different?

A sample left out of the whole run changes every later update too, so this is the effect of the data on the
run, where a window ablation is the effect of the data at a moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr

from stagewise.checkpoint import Checkpoint
from stagewise.evaluate import in_any_mode
from stagewise.groups import Labels, query_groups, train_groups
from stagewise.labelled import effect_dataset
from stagewise.retraining.losses import Progress, losses_along, paired_losses
from stagewise.retraining.schedule import LearningRate, Order, Schedule
from stagewise.retraining.start import check_moves, check_order, check_steps, start_at
from stagewise.stacking import BatchingChoice
from stagewise.task import Task


@in_any_mode
def retrain(
    task: Task,
    start: Checkpoint,
    schedules: Sequence[Schedule],
    order: Order,
    steps: Sequence[int],
    *,
    learning_rate: LearningRate | None = None,
    max_replays: int = 256,
    batching: BatchingChoice = "auto",
    progress: Progress | None = None,
) -> xr.DataArray:
    """Mean loss of every query group along replays of training that see the data as the schedules say.

    All replays start at the same weights, make the checkpoint's own updates and share their batches. Their
    learning rates are the run's own as far as the trajectory's later checkpoints know them, then held: if they are not
    known and changed, pass ``learning_rate``, or these are other runs. Groups of parameters keep the ratios of their
    rates.

    Args:
        task: the model, its losses and data.
        start: where the replays start, with optimiser and optimiser state; at step 0 the state is empty.
        schedules: the sample weights of each replay, e.g. ``Schedule.whole_run`` or ``Schedule.window``.
        order: the samples of every update.
        steps: when to look, ascending from ``start.step`` on; training ends at the last.
        learning_rate: of the update made at ``step``; default: the run's own where known
            (``Checkpoint.coming_rates``), else the checkpoint's, held.
        max_replays: most replays trained at once.
        batching: how the replays are evaluated: ``"stacked"`` in one ``vmap``, ``"loop"``: one by one, ``"auto"``:
            stacked if the model allows it.
        progress: called with (replays done, replays in all) after every stack.

    Returns:
        Losses in nats ``(step, replay, query)``; ``replay`` counts the schedules.

    Raises:
        ValueError: there are no schedules, the steps cannot be reached, the order does not fit the data or the
            checkpoint, the checkpoint lacks what its optimizer needs, or its learning rate is 0 and held.
        CheckpointError: the checkpoint is of another model.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)},
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> without_first = sw.Schedule.whole_run([0], weight=0.0)
        >>> sw.retrain(task, start, [sw.Schedule(), without_first], sw.BatchOrder(4), [0, 5, 10]).shape
        (3, 2, 1)
    """
    if not schedules or max_replays < 1:
        raise ValueError(f"need one schedule or more and max_replays >= 1, got {len(schedules)} and {max_replays}")
    chosen, origin = check_steps(start, steps), start_at(task, start)
    check_moves(origin, learning_rate)
    check_order(origin, order)
    way, parts = origin.decided(batching, min(max_replays, len(schedules))), []
    for first in range(0, len(schedules), max_replays):
        stack = schedules[first : first + max_replays]
        parts.append(losses_along(origin, stack, order, chosen, batching=way, learning_rate=learning_rate))
        if progress is not None:
            progress(first + len(stack), len(schedules))
    coords = {"step": chosen, "replay": range(len(schedules)), "query": list(query_groups(task).labels)}
    return xr.DataArray(torch.cat(parts, 1).numpy(), coords, ("step", "replay", "query"), "loss", {"units": "nats"})


def leave_out(
    task: Task,
    start: Checkpoint,
    order: Order,
    steps: Sequence[int],
    *,
    weight: float = 0.0,
    groups: Labels | None = None,
    learning_rate: LearningRate | None = None,
    max_replays: int = 256,
    batching: BatchingChoice = "auto",
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect on every query group of changing the weight of every train group during the whole run.

        effect[i, j] = mean loss of query group j, group i changed  -  the same, unchanged.

    A sample's effect on itself is in it, where the queries hold training samples. All replays make the checkpoint's
    own updates. Learning rates are those that :func:`retrain` explains.

    Args:
        task: the model, its losses and data.
        start: where the replays start, with optimiser and optimiser state; at step 0 the state is empty.
        order: the samples of every update, the same for all replays.
        steps: when to look, ascending from ``start.step`` on.
        weight: of the changed group's samples from ``start`` on; 0 leaves them out. Not 1, which is no change.
        groups: label of every training sample; default ``task.train_groups``, or every candidate alone if there are
            at most 64.
        learning_rate: of the update made at ``step``; default: the run's own where known
            (``Checkpoint.coming_rates``), else the checkpoint's, held.
        max_replays: most replays trained at once.
        batching: how the replays are evaluated: ``"stacked"`` in one ``vmap``, ``"loop"``: one by one, ``"auto"``:
            stacked if the model allows it.
        progress: called with (groups done, groups in all) after every stack of replays.

    Returns:
        ``effect`` (step, train, query) in nats, positive = the group was helpful if ``weight`` < 1;
        ``loss`` (step, query) of the unchanged replay, in nats; coordinates ``train_size`` and ``query_size``.

    Raises:
        ValueError: the weight is 1, there are no groups, the steps cannot be reached, the order does not fit the data
            or the checkpoint, the checkpoint lacks what its optimizer needs, or its learning rate is 0 and held.
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
        >>> sw.leave_out(task, start, sw.BatchOrder(4), [5, 10]).effect.shape
        (2, 2, 1)
    """
    if max_replays < 2:
        raise ValueError(f"need max_replays >= 2, a changed replay and the unchanged one, got {max_replays}")
    if weight == 1:
        raise ValueError("weight is 1, with which nothing is changed; use another, e.g. 0 to leave each group out")
    chosen, trained = check_steps(start, steps), train_groups(task, groups)
    origin = start_at(task, start)
    check_moves(origin, learning_rate)
    check_order(origin, order)
    effect, loss = paired_losses(
        origin,
        [Schedule.whole_run(index, weight, trained.tokens) for index in trained.indices],
        order,
        chosen,
        max_replays=max_replays,
        batching=origin.decided(batching, min(max_replays, len(trained.indices) + 1)),
        learning_rate=learning_rate,
        progress=progress,
    )
    attrs = {"estimator": "leave-out retraining"}
    dataset = effect_dataset(effect.numpy(), None, chosen, trained, query_groups(task), weight, attrs)
    return dataset.assign(loss=(("step", "query"), loss.numpy(), {"units": "nats"}))
