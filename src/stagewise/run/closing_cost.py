"""What comes beside the chains and the estimators: retraining, repeating the run, and reading the traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from time import perf_counter

import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.influence.trusted import TracesInMemory
from stagewise.results import EXACT
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.orders import window_orders
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.start import Start, start_at
from stagewise.retraining.training import train
from stagewise.retraining.two_times import influence_in_time
from stagewise.run.analysis import recorded_order, retraining_window, spread
from stagewise.run.config import RunConfig
from stagewise.run.estimator_cost import Window, orders_of
from stagewise.run.probe_cost import Probe, filled
from stagewise.run.spread_cost import Priced
from stagewise.run.work import traced_labels
from stagewise.task import Task
from stagewise.traces.diagnostics import diagnose
from stagewise.traces.store import label_words

NOT_PRICED = "not priced: maps and single samples of the report, and its figures"

_CLOSER = 4  # checkpoints at which chains are asked for single samples
_LONGEST = 1000  # updates: what the run itself does not repeat


def closing_costs(
    task: Task,
    config: RunConfig,
    checkpoints: int,
    missing: Mapping[str, str],
    probes: Sequence[Probe],
) -> dict[str, float]:
    """Seconds of reading the traces, on one process."""
    drawn = [probe.seen for probe in probes if probe.seen is not None]
    if not drawn:
        return {}
    tree, answered = filled(drawn[-1], config.sampling, task), checkpoints * len(drawn) / len(probes)
    single = config.exemplars and ("exact" not in config.estimators or EXACT in missing)
    seconds = _read(task, config, tree, answered, min(_CLOSER, answered) * bool(single))
    return {"verdicts and influence from the chains": seconds}


def retraining_costs(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> list[Priced]:
    """The cells that train again: windows, the whole run, and the run for influence in two times."""
    found = list[Priced]()
    if (window := retraining_window(config)) is not None:
        found.append(Priced("retraining windows", len(steps), _retrained(task, trajectory, config, steps, window)))
        found.append(Priced("repeating the run", 1, _repeated(task, trajectory, config, steps), whole=True))
    if config.two_times and len(steps) > 1:
        found.append(Priced("influence in two times", 1, _in_two_times(task, trajectory, config, steps), whole=True))
    return found


def _read(task: Task, config: RunConfig, tree: xr.DataTree, answered: float, closer: float) -> float:
    """Seconds of what is made of all traces, from one checkpoint of as many draws."""
    labels = label_words(*traced_labels(task, config.sampling))
    traces = TracesInMemory({0: tree}, labels)
    seconds = answered * (
        _seconds(lambda: diagnose(tree, labels))
        + _seconds(lambda: bif(traces, trusted_only=False))
        + _seconds(lambda: bif(traces, kind="correlation", trusted_only=False))
    )
    if closer:
        alone = TracesInMemory({0: tree}, labels | {"train": None})
        seconds += closer * _seconds(lambda: bif(alone, trusted_only=False))
    return seconds


def _retrained(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int], window: int) -> float:
    """Seconds of a window, one in the middle, that is trained again with every group's weight changed."""
    step, settings, order = steps[len(steps) // 2], config.retraining, recorded_order(task, trajectory, config)
    weight = settings.weight if settings else 1.0

    def again(length: int) -> object:
        return window_ablation(task, trajectory, window=length, weight=weight, steps=[step], repeats=1, order=order)

    orders = orders_of(task, trajectory, config, step, window)
    return orders * Window.of(again).of_length(window)


def _repeated(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> float:
    """Seconds of training on from every checkpoint to the next; none where the batches are not known."""
    start = start_at(task, trajectory.load(steps[0]))
    orders = window_orders(start, recorded_order(task, trajectory, config), 1, 1, 0)
    if not orders.known:
        return 0.0

    def again(length: int) -> object:
        updates, batches = range(start.step, start.step + length), BatchOrder(len(task.train), _batch_size(start))
        return train(start, start.state(), [Schedule()], batches, updates)

    each, counts = Window.of(again), [after - step for step, after in pairwise(trajectory.steps) if step in steps]
    return sum(each.of_length(count) for count in counts if count <= _LONGEST)


def _in_two_times(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> float:
    """Seconds, at most: as if the walks back from every later step had nothing in common. 0 where it has no answer."""
    start, last = trajectory.load(steps[0]), spread(steps[1:], config.two_times)
    began = start_at(task, start)
    batches = BatchOrder(len(task.train), _batch_size(began))

    def walk(length: int) -> object:
        return influence_in_time(task, start, batches, [start.step + length])

    with suppress(ValueError):
        each = Window.of(walk)
        return sum(each.of_length(step - start.step) for step in last)
    return 0.0


def _batch_size(start: Start) -> int:
    """Of the run; the whole training set where it is not known."""
    return start.rule.optimizer.batch_size or 0


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
