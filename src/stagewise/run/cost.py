"""What a run will cost, measured on a few steps instead of guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter

import torch

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.memory import give_back
from stagewise.run.analysis import spread
from stagewise.run.before import look
from stagewise.run.closing_cost import NOT_PRICED, closing_costs
from stagewise.run.config import RunConfig
from stagewise.run.crew import default_workers
from stagewise.run.estimator_cost import duration, estimator_costs, results_note
from stagewise.run.estimators import SAMPLED
from stagewise.run.memory_cost import Room, losses, most, peak, resident
from stagewise.run.preflight import preflight
from stagewise.run.probe_cost import Probe, filled, probe, written
from stagewise.run.source import trajectory_of
from stagewise.run.task_file import load_task
from stagewise.sampling.block import move_apart
from stagewise.sampling.chains import Chains
from stagewise.sampling.krylov import STORED
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task
from stagewise.usable import chosen_steps

_PROBES = 12  # checkpoints at which the sampler is tuned
# Vectors of the parameters' length: of the model and the posterior, of one chain while it moves and while it waits.
_FIXED, _MOVING, _KEPT = 6, 8, 2
# Of independent draws also those of the window's updates, and of the steps of Lanczos where these are kept.
_UPDATES, _KRYLOV = 4, 40


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a run.

    Attributes:
        cells: units of work.
        parts: wall-clock seconds by what they are spent on; sampling on ``workers`` processes, all else on one.
        memory: most bytes of one worker on the CPU, while its chains move or while a cell is written; what chains take
            is what a few steps and draws took.
        disk: bytes of all traces.
        workers: processes.
        steps: sampler steps over all cells.
        notes: what was understood of the data, and what will be left out.
    """

    cells: int
    parts: Mapping[str, float]
    memory: float
    disk: float
    workers: int
    steps: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    def text(self) -> str:
        """For a person."""
        lines = [
            f"{self.cells} cells (checkpoint x chain block), {self.steps:,} sampler steps in all",
            f"time    about {duration(self.seconds)}, with {self.workers} worker(s) for the chains",
            *(f"        {duration(seconds):>12}  {what}" for what, seconds in self.parts.items()),
            f"memory  about {self.memory / 2**20:,.0f} MiB for each worker, beside the libraries",
            f"disk    about {self.disk / 2**20:,.0f} MiB of traces",
        ]
        return "\n".join([*lines, *self.notes])


def estimate(config: RunConfig) -> Cost:
    """Cost of a configuration, after trying on a few samples all that the run will need.

    Raises:
        ValueError: the configuration, task or checkpoints cannot be used.
    """
    start = perf_counter()
    task = load_task(config.task, config.task_args)
    trajectory = trajectory_of(config.checkpoints, config.steps, config.clip_norm, config.batch_size)
    steps = chosen_steps(trajectory, config.steps)
    usable, unusable = look(task, trajectory, config.posterior, steps, SAMPLED in config.estimators)
    missing = preflight(task, trajectory, config, list(usable))
    parts = {"checks before the work": perf_counter() - start}  # the run makes the same
    workers, probes = config.workers or default_workers(task), list[Probe]()
    cost, notes = Cost(0, {}, 0.0, 0.0, workers, 0), [repr(task)]
    if SAMPLED in config.estimators:
        probes, room = _measured(task, trajectory, config.posterior, config.sampling, list(usable), workers)
        cost = _sampling_cost(task, config.sampling, len(usable), workers, probes, room)
        notes += answered(config.posterior, probes)
        if len(looks := config.sampling.looks) > 1:
            notes.append(f"draws: auto, priced as if each checkpoint took {looks[-1]:,}; many will end at {looks[0]:,}")
    parts |= cost.parts
    parts |= estimator_costs(task, trajectory, config, list(usable), missing)
    parts |= closing_costs(task, trajectory, config, list(usable), missing, probes)
    notes += [NOT_PRICED, results_note(task, config, len(usable))]
    notes += [f"step {step} cannot be used: {reason}" for step, reason in unusable.items()]
    notes += [f"without {name}: {reason}" for name, reason in missing.items()]
    return replace(cost, parts=parts, notes=tuple(notes))


def sampling_cost(
    task: Task, trajectory: Trajectory, posterior: LocalPosterior, sampling: Chains, steps: Sequence[int], workers: int
) -> Cost:
    """Of the chains alone: the sampler is tuned at twelve checkpoints, and a few of its steps and draws are timed.

    Raises:
        ValueError: the task, a checkpoint or the posterior cannot be used.
    """
    probes, room = _measured(task, trajectory, posterior, sampling, steps, workers)
    return _sampling_cost(task, sampling, len(steps), workers, probes, room)


def _measured(
    task: Task, trajectory: Trajectory, posterior: LocalPosterior, sampling: Chains, steps: Sequence[int], workers: int
) -> tuple[list[Probe], Room]:
    """With the threads of one worker; the first of them twice, as its first time makes some things that are kept."""
    threads, chosen = torch.get_num_threads(), spread(steps, _PROBES)
    torch.set_num_threads(max(1, threads // workers))
    before, held = peak(), resident()
    try:
        probes = [probe(task, trajectory, posterior, sampling, step) for step in [chosen[0], *chosen]][1:]
    finally:
        torch.set_num_threads(threads)
    taken = peak() - before
    give_back()
    return probes, Room(taken, max(resident() - held, 0.0))


def _sampling_cost(
    task: Task, sampling: Chains, checkpoints: int, workers: int, probes: Sequence[Probe], room: Room
) -> Cost:
    cells = checkpoints * sampling.blocks
    # Cells go to whoever is free: the last ones keep some workers busy while others have no more.
    rounds = math.ceil(cells / workers)
    parameters = sum(p.numel() for p in task.model.parameters())
    chains = 4.0 * copies(sampling, parameters) * parameters
    drawn = [probe.seen for probe in probes if probe.seen is not None]
    writing, size = written(filled(drawn[-1], sampling, task)) if drawn else (0.0, 0.0)
    memory = most(room, chains, losses(drawn[-1], sampling) if drawn else [], size)
    answered = len(drawn) / len(probes)
    return Cost(
        cells,
        {"sampling": rounds * (fmean(probe.seconds for probe in probes) + answered * writing)},
        memory,
        cells * answered * size,
        workers,
        round(cells * fmean(probe.steps for probe in probes)),
    )


def copies(sampling: Chains, parameters: int) -> int:
    """Of the parameters, in one worker: the model's, the checkpoint's, and those of chains on their way."""
    apart = move_apart(sampling.chains, parameters) and sampling.batching != "stacked"
    together, window = 1 if apart else sampling.chains, sampling.sampler == "window"
    moving = _MOVING + _KRYLOV * (window and together * parameters <= STORED)
    waiting = (sampling.chains if apart else 0) + (sampling.chains if sampling.linear and not window else 0)
    return _FIXED + _UPDATES * window + moving * together + _KEPT * waiting


def answered(posterior: LocalPosterior, probes: Sequence[Probe]) -> list[str]:
    """How many checkpoints have a posterior for the window asked for, and for shorter and longer ones, as a note.

    It rests on the curvature at a few checkpoints; the chains may find more that is wrong.
    """
    longest = [probe.longest for probe in probes if probe.longest is not None]
    if posterior.window is None or not longest:
        return []
    windows = sorted({max(1, posterior.window * times // 4) for times in (1, 2, 4, 8)})
    counts = ", ".join(f"{window} steps: {sum(most >= window for most in longest)}" for window in windows)
    return [f"checkpoints that can be answered, of {len(longest)} looked at, by the length of the window: {counts}"]
