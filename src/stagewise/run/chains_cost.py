"""What the chains of a run will cost: the sampler is tuned as in the run, and a few of its steps are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.memory import give_back
from stagewise.run.analysis import spread
from stagewise.run.memory_cost import Room, losses, most, peak, resident
from stagewise.run.priced import Cost
from stagewise.run.probe_cost import Probe, filled, probe, written
from stagewise.run.spread_cost import Priced, Workers
from stagewise.sampling.block import move_apart
from stagewise.sampling.chains import Chains
from stagewise.sampling.krylov import STORED
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

_PROBES = 12  # checkpoints at which the sampler is tuned
# Vectors of the parameters' length: of the model and the posterior, of one chain while it moves and while it waits.
_FIXED, _MOVING, _KEPT = 6, 8, 2
# Of independent draws also those of the window's updates, and of the steps of Lanczos where these are kept.
_UPDATES, _KRYLOV = 4, 40


def sampling_cost(
    task: Task, trajectory: Trajectory, posterior: LocalPosterior, sampling: Chains, steps: Sequence[int], workers: int
) -> Cost:
    """Of the chains alone: the sampler is tuned at twelve checkpoints, and a few of its steps and draws are timed.

    Raises:
        ValueError: the task, a checkpoint or the posterior cannot be used.
    """
    ours = Workers(workers, max(1, torch.get_num_threads() // workers))
    with threads_of(ours):
        probes, room = measured(task, trajectory, posterior, sampling, steps)
        return priced(task, sampling, len(steps), ours, probes, room)


@contextmanager
def threads_of(workers: Workers) -> Iterator[None]:
    """With the threads of one worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(workers.measured_with())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measured(
    task: Task, trajectory: Trajectory, posterior: LocalPosterior, sampling: Chains, steps: Sequence[int]
) -> tuple[list[Probe], Room]:
    """Cells at some checkpoints; the first of them twice, as its first time makes some things that are kept."""
    chosen = spread(steps, _PROBES)
    before, held = peak(), resident()
    probes = [probe(task, trajectory, posterior, sampling, step) for step in [chosen[0], *chosen]][1:]
    taken = peak() - before
    give_back()
    return probes, Room(taken, max(resident() - held, 0.0))


def priced(
    task: Task, sampling: Chains, checkpoints: int, workers: Workers, probes: Sequence[Probe], room: Room
) -> Cost:
    """Time, memory and disk of all cells, from those that were tried."""
    cells, parameters = checkpoints * sampling.blocks, sum(p.numel() for p in task.model.parameters())
    chains = 4.0 * copies(sampling, parameters) * parameters
    drawn = [probe.seen for probe in probes if probe.seen is not None]
    writing, size = written(filled(drawn[-1], sampling, task)) if drawn else (0.0, 0.0)
    answered = len(drawn) / len(probes)
    return Cost(
        (Priced("sampling", cells, fmean(probe.seconds for probe in probes) + answered * writing),),
        workers,
        memory=most(room, chains, losses(drawn[-1], sampling) if drawn else [], size),
        disk=cells * answered * size,
        steps=round(cells * fmean(probe.steps for probe in probes)),
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
