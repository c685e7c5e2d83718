"""What the results of each estimator will cost: time measured at one checkpoint, memory and disk counted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import query_groups
from stagewise.influence.pairs import Estimator, influence_matrix
from stagewise.results import BIF
from stagewise.retraining.orders import window_orders
from stagewise.retraining.start import start_at
from stagewise.run.analysis import recorded_order
from stagewise.run.config import RunConfig
from stagewise.run.estimators import NAMES, SAMPLED, estimate, unproved
from stagewise.run.per import asked, members, size_of
from stagewise.sampling.chains import Chains
from stagewise.task import Task
from stagewise.traces.columns import Columns
from stagewise.traces.stretches import stretches
from stagewise.varied import by_itself

_MANY = 512  # rows of a covariance that are timed
# Bytes are written as text: once as they come, once beside the other results.
_ON_DISK = 2 * 4 / 3


def estimator_costs(
    task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int], missing: Mapping[str, str]
) -> list[str]:
    """A line for every estimator that will be computed."""
    per, lines = asked(task, config), []
    count, queries, size = members(task, per), len(query_groups(task)), size_of(task, per, len(steps))
    what = f"{count:,} {per}{'' if count == 1 else 's'} x {queries:,} queries"
    kept = f"{_bytes(size)} in memory, at most {_bytes(_ON_DISK * size)} on disk"
    for name in config.estimators:
        called = NAMES.get(name, f"{BIF} of {per}s")
        if called in missing or (name == SAMPLED and per == by_itself(task)):
            continue  # what the chains say of groups takes no time beside the sampling
        if name == SAMPLED:
            seconds = len(steps) * _covariances(config.sampling, count, queries)
        else:
            timed = _exact if name == "exact" else partial(_at_one, name)
            seconds = timed(task, trajectory, config, steps)
        time_taken = f"about {duration(seconds)} for {len(steps)} checkpoints, on one process"
        lines.append(f"{called}: {time_taken}; {what}, {kept}")
    return lines


def duration(seconds: float) -> str:
    """``40 seconds``, ``3.5 minutes``."""
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes >= 1 else f"{seconds:.0f} seconds"


def _bytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _exact(task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> float:
    """Seconds of the exact influence at all checkpoints, from a window of one and one of three updates."""
    compute, step = estimate("exact", task, trajectory, config), steps[-1]

    def seconds(window: int) -> float:
        start = time.perf_counter()
        compute(window=window, steps=[step], repeats=1, check=unproved(config))
        return time.perf_counter() - start

    seconds(1)  # the first time some things are made that are kept
    one, three = seconds(1), seconds(3)
    window, order = config.posterior.window or 1, recorded_order(task, trajectory, config)
    asked_for = config.retraining.repeats if config.retraining else None
    orders = window_orders(start_at(task, trajectory.load(step)), order, window, asked_for, 0)
    each = one + len(orders.orders) * (window - 1) * max(three - one, 0.0) / 2
    return len(steps) * each * _passes(task, config, noisy=len(orders.orders) > 1)


def _at_one(name: str, task: Task, trajectory: Trajectory, config: RunConfig, steps: Sequence[int]) -> float:
    """Seconds at all checkpoints, from one in the middle."""
    start = time.perf_counter()
    estimate(name, task, trajectory, config)(steps=[steps[len(steps) // 2]])
    return len(steps) * (time.perf_counter() - start) * _passes(task, config, noisy=name == "damped")


def _passes(task: Task, config: RunConfig, noisy: bool) -> int:
    """Groups are computed beside samples and tokens where their errors do not follow from those of single values."""
    return 2 if noisy and asked(task, config) != by_itself(task) else 1


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
