"""What comes after the chains: seconds of reading their traces and of retraining, on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.influence.trusted import TracesInMemory
from stagewise.results import EXACT
from stagewise.retraining.ablation import window_ablation
from stagewise.run.analysis import recorded_order, retraining_window
from stagewise.run.config import RunConfig
from stagewise.run.estimator_cost import Window, orders_of
from stagewise.run.probe_cost import Probe, filled
from stagewise.run.work import traced_labels
from stagewise.task import Task
from stagewise.traces.diagnostics import diagnose
from stagewise.traces.store import label_words

NOT_PRICED = "not priced: maps, single samples and influence in two times of the report, its figures, repeating the run"

_CLOSER = 4  # checkpoints at which chains are asked for single samples


def closing_costs(
    task: Task,
    trajectory: Trajectory,
    config: RunConfig,
    steps: Sequence[int],
    missing: Mapping[str, str],
    probes: Sequence[Probe],
) -> dict[str, float]:
    """Seconds by what they are spent on; what will not be done is left out."""
    found, count = dict[str, float](), len(steps)
    drawn = [probe.seen for probe in probes if probe.seen is not None]
    if drawn:
        tree, answered = filled(drawn[-1], config.sampling, task), count * len(drawn) / len(probes)
        single = config.exemplars and ("exact" not in config.estimators or EXACT in missing)
        found["verdicts and influence from the chains"] = _read(
            task, config, tree, answered, min(_CLOSER, answered) * bool(single)
        )
    if (window := retraining_window(config)) is not None:
        found[f"retraining of {count} windows"] = count * _retrained(task, trajectory, config, steps[-1], window)
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


def _retrained(task: Task, trajectory: Trajectory, config: RunConfig, step: int, window: int) -> float:
    """Seconds of a window that is trained again with every group's weight changed."""
    settings, order = config.retraining, recorded_order(task, trajectory, config)
    weight = settings.weight if settings else 1.0

    def again(length: int) -> object:
        return window_ablation(task, trajectory, window=length, weight=weight, steps=[step], repeats=1, order=order)

    orders = orders_of(task, trajectory, config, step, window)
    return orders * Window.of(again).of_length(window)


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
