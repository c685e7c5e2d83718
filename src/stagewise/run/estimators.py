"""The estimators of a run: influence of groups, samples or tokens at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import query_groups
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.results import BIF, DAMPED, EXACT, FIRST_ORDER
from stagewise.retraining.window_influence import window_influence
from stagewise.run.analysis import Analysis, Stage, recorded_order
from stagewise.run.config import RunConfig
from stagewise.run.first_order import completed, first_order
from stagewise.run.per import asked, curves_of
from stagewise.task import Task
from stagewise.traces.store import TraceStore
from stagewise.varied import Per, by_itself

SAMPLED = "bif"
"""The estimator that needs chains, as a configuration calls it."""

NAMES = {"exact": EXACT, "damped": DAMPED, "gradient": "gradient product"}
"""What the estimators without chains are called in a report, by their name in a configuration."""


class Found(NamedTuple):
    """Influence by the estimators without chains, by their names in a report.

    Attributes:
        curves: of train groups, or of samples where there are none.
        single: of single samples or tokens, where they are asked for.
        left_out: why there is none.
    """

    curves: dict[str, xr.Dataset]
    single: dict[str, xr.Dataset]
    left_out: dict[str, str]


def estimate(
    name: str, task: Task, trajectory: Trajectory, config: RunConfig, per: Per | None = None
) -> Callable[..., xr.Dataset]:
    """An estimator without chains, as a function of ``steps``.

    Raises:
        ValueError: the exact influence is asked for, and no window is given.
    """
    per = per or asked(task, config)
    if name != "exact":
        of = {"damped": damped_influence, "gradient": gradient_product}[name]
        return partial(of, task, trajectory, config.posterior, per=per)
    if config.posterior.window is None:
        raise ValueError("it is that of a window of training: set posterior.window instead of gamma")
    repeats = config.retraining.repeats if config.retraining else None
    return partial(
        window_influence,
        task,
        trajectory,
        window=config.posterior.window,
        per=per,
        repeats=None if repeats == 1 else repeats,  # one order that is not the run's own would have no error
        order=recorded_order(task, trajectory, config),
        scratch=config.folder,
    )


def without_chains(analysis: Analysis) -> Found:
    """All estimators without chains that are asked for."""
    task, per, found = analysis.task, asked(analysis.task, analysis.config), Found({}, {}, {})
    for name in (name for name in analysis.config.estimators if name in NAMES):
        try:
            first = analysis.step_by_step(influence_stage(analysis, name, per))
            curves = first if per == by_itself(task) else curves_of(task, first)
            if curves is not None and "miss" in first:
                curves = curves.assign(miss=first["miss"])
            if curves is None:
                curves = analysis.step_by_step(influence_stage(analysis, name, by_itself(task)))
            found.curves[NAMES[name]] = curves
            if per != "group":
                found.single[NAMES[name]] = first
        except ValueError as error:
            found.left_out[NAMES[name]] = str(error)
    return found


def influence_stage(analysis: Analysis, name: str, per: Per) -> Stage:
    """One of the estimators without chains, at every checkpoint.

    Raises:
        ValueError: the exact influence is asked for, and no window is given.
    """
    task, config = analysis.task, analysis.config
    called = NAMES[name] if per == by_itself(task) else f"{NAMES[name]} of {per}s"
    compute = estimate(name, task, analysis.trajectory, config, per)
    if name != "exact":
        return Stage(called, "", analysis.digests, compute)
    digests = analysis.of_windows(config.posterior.window or 0)
    return Stage(called, _window_cause(config), digests, partial(compute, check=unproved(config)))


def unproved(config: RunConfig) -> bool:
    """Whether nothing else says how large a change of weight exact influence is right for: retraining does."""
    return config.retraining is None


def _window_cause(config: RunConfig) -> str:
    return f"{config.posterior.window} {config.retraining!r}"


def of_chains(analysis: Analysis, store: TraceStore) -> xr.Dataset:
    """What the draws say of single samples or tokens, to first order without noise where that is recorded and exists.

    Raises:
        ValueError: no checkpoint has chains that can be trusted, with the reasons.
    """
    per = asked(analysis.task, analysis.config)

    def compute(steps: list[int]) -> xr.Dataset:
        drawn = partial(bif, OneByOne(store, steps), tokens=per == "token")
        return completed(drawn, first_order(analysis, per, steps)).drop_dims("replicate", errors="ignore")

    cause = f"{analysis.config.sampling.blocks}{f' {FIRST_ORDER}' if analysis.config.sampling.linear else ''}"
    return analysis.step_by_step(Stage(f"{BIF} of {per}s", cause, analysis.digests, compute, as_cells=False))


def sampled_samples(analysis: Analysis, store: TraceStore, steps: list[int], queries: list[Any]) -> xr.Dataset:
    """Influence of every sample on some queries at some steps, from the chains, as :func:`of_chains`."""
    known = first_order(analysis, "sample", steps)
    return completed(partial(bif, OneByOne(store, steps)), known).sel(query=queries)


class OneByOne:
    """A store seen at some steps, with grouped queries but every training sample on its own."""

    def __init__(self, store: TraceStore, steps: Sequence[int]) -> None:
        self.steps = steps
        self.load = store.load
        self.labels = store.labels | {"train": None}
        self.verdicts: Mapping[int, tuple[str, str]] = getattr(store, "verdicts", {})


def exact_samples(analysis: Analysis, steps: list[int], queries: list[Any]) -> xr.Dataset:
    """Influence of every sample on some queries at some steps, from the replayed window."""
    config = analysis.config
    few = _few(analysis.task, queries)
    of_samples = estimate("exact", few, analysis.trajectory, config, "sample")
    seen = analysis.of_windows(config.posterior.window or 0)
    name, cause = "exact influence of samples", f"{_window_cause(config)} {queries}"
    digests = {step: seen[step] for step in steps}
    return analysis.step_by_step(Stage(name, cause, digests, of_samples, as_cells=False))


def exact_tokens(analysis: Analysis, picked: Mapping[int, Sequence[int]], queries: list[Any]) -> dict[int, xr.Dataset]:
    """Influence of every token of the samples that were picked at each step: the same window, replayed once more.

    Nothing is held of the tokens of all the others, of which there may be too many.
    """
    config, found, name = analysis.config, dict[int, xr.Dataset](), "exact influence of tokens"
    seen = analysis.of_windows(config.posterior.window or 0)
    for done, step in enumerate(picked, start=1):
        few = _few(analysis.task, queries)
        few.candidates = torch.tensor(sorted(picked[step]))
        compute = partial(estimate("exact", few, analysis.trajectory, config, "token"), steps=[step])
        cause = f"{_window_cause(config)} {queries} {few.candidates.tolist()} {step} {seen[step]}"
        found[step] = analysis.kept.get(name, cause, compute)
        analysis.progress(name, done, len(picked))
    return found


def _few(task: Task, queries: Sequence[Any]) -> Task:
    """The same task with some of its query groups: each of them costs products of its own."""
    few = copy(task)
    few.grouped_queries = query_groups(task).named([str(query) for query in queries])
    return few
