"""What a run will cost, measured on a few steps instead of guessed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.run.analysis import spread
from stagewise.run.before import look
from stagewise.run.config import RunConfig
from stagewise.run.engine import default_workers
from stagewise.run.estimator_cost import duration, estimator_costs
from stagewise.run.estimators import SAMPLED
from stagewise.run.preflight import preflight
from stagewise.run.source import trajectory_of
from stagewise.run.task_file import load_task
from stagewise.sampling.block import move_apart
from stagewise.sampling.chains import Chains
from stagewise.sampling.coupled import quadratic_gradient
from stagewise.sampling.curvature import extreme_curvature
from stagewise.sampling.gradient import potential_gradient
from stagewise.sampling.krylov import STORED
from stagewise.sampling.posterior import LocalDensity, LocalPosterior, largest_window
from stagewise.sampling.tuning import Tuning, tune
from stagewise.sampling.watch import Watch
from stagewise.task import Task
from stagewise.usable import chosen_steps

# Cells are stored as zstd-compressed float32, which keeps about this share of the bytes of loss traces.
_COMPRESSED = 0.9
_PROBES = 3
# Vectors of the parameters' length: of the model and the posterior, of one chain while it moves and while it waits.
_FIXED, _MOVING, _KEPT = 6, 8, 2
# Of independent draws also those of the window's updates, and of the steps of Lanczos where these are kept.
_UPDATES, _KRYLOV = 4, 40
_CURVATURES = 12


@dataclass(frozen=True)
class Cost:
    """Predicted cost of sampling.

    Attributes:
        cells: units of work.
        seconds: wall-clock time on ``workers`` processes.
        memory: bytes of one worker's chains and traces.
        disk: bytes of all traces.
        workers: processes.
        steps: sampler steps over all cells.
        notes: what was understood of the data, and what will be left out.
    """

    cells: int
    seconds: float
    memory: float
    disk: float
    workers: int
    steps: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For a person."""
        return (
            f"{self.cells} cells (checkpoint x chain block), {self.steps:,} sampler steps in all\n"
            f"time    about {duration(self.seconds)} of sampling on {self.workers} worker(s), "
            "plus analysis and retraining\n"
            f"memory  about {self.memory / 2**20:,.0f} MiB for each worker, beside the libraries\n"
            f"disk    about {self.disk / 2**20:,.0f} MiB of traces" + "".join(f"\n{note}" for note in self.notes)
        )


def estimate(config: RunConfig) -> Cost:
    """Cost of a configuration's sampling, after trying on a few samples all that the run will need.

    Raises:
        ValueError: the configuration, task or checkpoints cannot be used.
    """
    task = load_task(config.task, config.task_args)
    trajectory = trajectory_of(config.checkpoints, config.steps, config.clip_norm, config.batch_size)
    steps = chosen_steps(trajectory, config.steps)
    usable, unusable = look(task, trajectory, config.posterior, steps, SAMPLED in config.estimators)
    missing = preflight(task, trajectory, config, list(usable))
    workers = config.workers or default_workers(task)
    cost, notes = Cost(0, 0.0, 0.0, 0.0, workers, 0), [repr(task)]
    if SAMPLED in config.estimators:
        cost = sampling_cost(task, trajectory, config.posterior, config.sampling, list(usable), workers)
        if config.sampling.sampler != "window":
            notes += answered(task, trajectory, config.posterior, list(usable))
    notes += estimator_costs(task, trajectory, config, list(usable), missing)
    notes += [f"step {step} cannot be used: {reason}" for step, reason in unusable.items()]
    notes += [f"without {name}: {reason}" for name, reason in missing.items()]
    return replace(cost, notes=tuple(notes))


def sampling_cost(
    task: Task, trajectory: Trajectory, posterior: LocalPosterior, sampling: Chains, steps: Sequence[int], workers: int
) -> Cost:
    """Tune the sampler at three checkpoints and time one step and one draw there.

    Raises:
        ValueError: the task, a checkpoint or the posterior cannot be used.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        probes = [_probe(posterior.at(task, trajectory.load(step)), sampling) for step in spread(steps, _PROBES)]
    finally:
        torch.set_num_threads(threads)
    cells = len(steps) * sampling.blocks
    per_cell = sum(seconds for seconds, _ in probes) / len(probes)
    per_cell_steps = sum(count for _, count in probes) / len(probes)
    samples = len(task.candidates) + sum(len(data) for data in task.queries.values())
    losses = samples * _tokens(task) * (1 + sampling.reflect + sampling.linear)
    traces = 4.0 * sampling.chains * sampling.looks[-1] * losses
    parameters = sum(p.numel() for p in task.model.parameters())
    # Traces are kept as float32 changes, and put together as float64 at the end.
    memory = 4 * traces + 4.0 * copies(sampling, parameters) * parameters
    return Cost(
        cells,
        per_cell * cells / min(workers, cells),
        memory,
        traces * cells * _COMPRESSED,
        workers,
        round(per_cell_steps * cells),
    )


def copies(sampling: Chains, parameters: int) -> int:
    """Of the parameters, in one worker: the model's, the checkpoint's, and those of chains on their way."""
    apart = move_apart(sampling.chains, parameters) and sampling.batching != "stacked"
    together, window = 1 if apart else sampling.chains, sampling.sampler == "window"
    moving = _MOVING + _KRYLOV * (window and together * parameters <= STORED)
    waiting = (sampling.chains if apart else 0) + (sampling.chains if sampling.linear and not window else 0)
    return _FIXED + _UPDATES * window + moving * together + _KEPT * waiting


def answered(task: Task, trajectory: Trajectory, posterior: LocalPosterior, steps: Sequence[int]) -> list[str]:
    """How many checkpoints have a posterior for the window asked for, and for shorter and longer ones, as a note.

    It rests on the curvature at a few checkpoints; the chains may find more that is wrong.
    """
    if posterior.window is None:
        return []
    longest = [_longest(posterior, task, trajectory.load(step)) for step in spread(steps, _CURVATURES)]
    windows = sorted({max(1, posterior.window * times // 4) for times in (1, 2, 4, 8)})
    counts = ", ".join(f"{window} steps: {sum(most >= window for most in longest)}" for window in windows)
    return [f"checkpoints that can be answered, of {len(longest)} looked at, by the length of the window: {counts}"]


def _longest(posterior: LocalPosterior, task: Task, checkpoint: Checkpoint) -> int:
    density = posterior.at(task, checkpoint)
    smallest, optimizer = extreme_curvature(density).smallest, density.optimizer
    return largest_window(smallest, optimizer, checkpoint.coming_rates) if optimizer else 0


def _probe(density: LocalDensity, sampling: Chains) -> tuple[float, int]:
    """Seconds and sampler steps of one cell at this checkpoint."""
    start = time.perf_counter()
    tuning = tune(density, sampling)
    tuned = time.perf_counter() - start
    if tuning.refused or (tuning.localised is False and density.posterior.require_localised):
        return tuned, 0
    count = tuning.burn_in + sampling.looks[-1] * tuning.thinning
    step, draw = _times(tuning, sampling)
    return tuned + count * step + sampling.looks[-1] * draw, count


def _times(tuning: Tuning, sampling: Chains) -> tuple[float, float]:
    """Seconds of one step and of looking at one draw of a block of chains.

    Chains of a large model move one by one: one of them is timed, and the others are not held.
    """
    density, batching = tuning.density, tuning.batching
    one_by_one = batching != "stacked" and move_apart(sampling.chains, density.vector.size)
    chains = 1 if one_by_one else sampling.chains
    u = torch.zeros(chains, density.vector.size).to(density.anchor)
    size, random = tuning.batch_size, torch.Generator
    gradients = [potential_gradient(density, chains, size, sampling.control_variate, batching, random())]
    if sampling.linear and sampling.sampler != "window":
        gradients.append(quadratic_gradient(density, chains, size, random()))
    sampler, noise = tuning.sampler, torch.Generator(u.device)
    states = [sampler.step(sampler.init(u, noise), gradient, noise) for gradient in gradients]
    start = time.perf_counter()
    for _ in range(3):
        states = [sampler.step(state, slope, noise) for state, slope in zip(states, gradients, strict=True)]
        sum(state.position.sum().item() for state in states)
    middle = time.perf_counter()
    Watch(density, batching, sampling.reflect, sampling.single_tokens, sampling.linear).draw(u)
    times = sampling.chains // chains
    return times * (middle - start) / 3, times * (time.perf_counter() - middle)


def _tokens(task: Task) -> int:
    with torch.no_grad():
        losses = task.losses({}, task.train.batch(slice(0, 1), task.device))
    return losses.shape[1] if losses.ndim == 2 else 1
