"""What the results of each estimator will cost: time measured at one checkpoint, memory and disk counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Self

import numpy as np

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import query_groups
from stagewise.influence.pairs import Estimator, influence_matrix
from stagewise.results import BIF, FIRST_ORDER
from stagewise.retraining.orders import window_orders
from stagewise.retraining.start import start_at
from stagewise.run.analysis import recorded_order
from stagewise.run.config import RunConfig
from stagewise.run.estimators import NAMES, SAMPLED, estimate, unproved
from stagewise.run.first_order import solver
from stagewise.run.per import asked, members, size_of
from stagewise.run.priced import size as words_of
from stagewise.run.spread_cost import Priced
from stagewise.sampling.chains import Chains
from stagewise.task import Task
from stagewise.traces.columns import Columns
from stagewise.traces.stretches import stretches
from stagewise.varied import by_itself

_MANY = 512  # rows of a covariance that are timed
# Bytes are written as text: once as they come, once beside the other results.
ON_DISK = 2 * 4 / 3


def estimator_costs(
    task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int], missing: Mapping[str, str]
) -> list[Priced]:
    """The cells of every estimator without chains that will be computed."""
    found = list[Priced]()
    for name in (name for name in config.estimators if name in NAMES and NAMES[name] not in missing):
        timed = _exact if name == "exact" else partial(_at_one, name)
        seconds, noisy = timed(task, trajectory, config, steps)
        found += _stages(NAMES[name], task, config, len(steps), seconds, noisy)
    if SAMPLED in config.estimators and config.sampling.linear:
        seconds = _first_order(task, trajectory, config, steps)
        found += _stages(FIRST_ORDER, task, config, len(steps), seconds, noisy=True)
    return found


def reading_cost(task: Task, config: RunConfig, steps: Sequence[int], missing: Mapping[str, str]) -> dict[str, float]:
    """Seconds of what the chains say of single samples or tokens, on one process.

    What they say of groups is priced with the reading of their traces.
    """
    per = asked(task, config)
    name = f"{BIF} of {per}s"
    if SAMPLED not in config.estimators or name in missing or per == by_itself(task):
        return {}
    seconds = len(steps) * _covariances(config.sampling, members(task, per), len(query_groups(task)))
    return {f"{name} at {len(steps)} checkpoints": seconds}


def results_note(task: Task, config: RunConfig, checkpoints: int) -> str:
    """How large the results of an estimator are, in words."""
    per = asked(task, config)
    count, queries, size = members(task, per), len(query_groups(task)), size_of(task, per, checkpoints)
    what = f"{count:,} {per}{'' if count == 1 else 's'} x {queries:,} queries"
    return f"results of each estimator: {what}, {words_of(size)} in memory, at most {words_of(ON_DISK * size)} on disk"


class Window(NamedTuple):
    """Seconds of work on a window of updates.

    Attributes:
        fixed: whatever its length.
        update: of each update.
    """

    fixed: float
    update: float

    @classmethod
    def of(cls, work: Callable[[int], object]) -> Self:
        """From windows of one and of three updates."""

        def seconds(length: int) -> float:
            start = time.perf_counter()
            work(length)
            return time.perf_counter() - start

        seconds(1)  # the first time some things are made that are kept
        one, three = (min(seconds(length) for _ in range(2)) for length in (1, 3))
        update = max(three - one, 0.0) / 2
        return cls(max(one - update, 0.0), update)

    def of_length(self, updates: float) -> float:
        """Seconds of so many updates."""
        return self.fixed + updates * self.update


def _exact(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> tuple[float, bool]:
    """Seconds of the exact influence at one checkpoint, and whether it has errors."""
    compute, step = estimate("exact", task, trajectory, config), steps[len(steps) // 2]
    window = config.posterior.window or 1
    orders = orders_of(task, trajectory, config, step, window)
    each = Window.of(lambda length: compute(window=length, steps=[step], repeats=1, check=unproved(config)))
    return each.of_length(orders * window), orders > 1


def orders_of(task: Task, trajectory: Trajectory, config: RunConfig, step: int, window: int) -> int:
    """With how many batch orders a window is replayed."""
    asked_for = config.retraining.repeats if config.retraining else None
    start = start_at(task, trajectory.load(step))
    return len(window_orders(start, recorded_order(task, trajectory, config), window, asked_for, 0).orders)


def _at_one(
    name: str, task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]
) -> tuple[float, bool]:
    """Seconds at one checkpoint, in the middle, and whether it has errors."""
    start = time.perf_counter()
    estimate(name, task, trajectory, config)(steps=[steps[len(steps) // 2]])
    return time.perf_counter() - start, name == "damped"


def _first_order(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> float:
    """Seconds at one checkpoint, in the middle: of the solve, or until it is seen that there is none."""
    start, per = time.perf_counter(), asked(task, config)
    with suppress(ValueError):
        solver(task, trajectory, config, per)(steps=[steps[len(steps) // 2]])
    return time.perf_counter() - start


def _stages(name: str, task: Task, config: RunConfig, cells: int, seconds: float, noisy: bool) -> list[Priced]:
    """Groups are computed beside samples and tokens where their errors do not follow from those of single values."""
    per, own = asked(task, config), by_itself(task)
    first = Priced(name if per == own else f"{name} of {per}s", cells, seconds)
    return [first, Priced(name, cells, seconds, later=name == NAMES["exact"])] if noisy and per != own else [first]


def _covariances(sampling: Chains, count: int, queries: int) -> float:
    """Seconds of the covariances of all draws at one checkpoint, from those of a few columns."""
    rows, random = min(count, _MANY), np.random.default_rng(0)
    shape = (sampling.chains * sampling.blocks, sampling.looks[-1])
    train, query = (
        Columns(random.standard_normal((*shape, number)), np.arange(number), [str(k) for k in range(number)])
        for number in (rows, queries)
    )
    estimator = Estimator("covariance", "pooled", 1.0, stretches(*shape))
    start = time.perf_counter()
    influence_matrix(train, query, estimator, shared=False)
    return (time.perf_counter() - start) * count / rows
