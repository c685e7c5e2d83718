"""What a run will cost, measured on a few steps instead of guessed."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.identity import identity, probe
from stagewise.run.before import check_same_task, look
from stagewise.run.chains_cost import answered, measured, priced, threads_of
from stagewise.run.closing_cost import NOT_PRICED, closing_costs, retraining_costs
from stagewise.run.config import RunConfig
from stagewise.run.estimator_cost import ON_DISK, estimator_costs, reading_cost, results_note
from stagewise.run.estimators import SAMPLED
from stagewise.run.moved_cost import Moved
from stagewise.run.per import asked, size_of
from stagewise.run.preflight import preflight
from stagewise.run.priced import Cost
from stagewise.run.probe_cost import Probe
from stagewise.run.slices import Slice
from stagewise.run.source import trajectory_of
from stagewise.run.spread_cost import Workers
from stagewise.run.task_file import load_task
from stagewise.task import Task
from stagewise.usable import chosen_steps


def estimate(config: RunConfig, part: Slice | None = None) -> Cost:
    """Cost of a configuration, after trying on a few samples all that the run will need.

    Args:
        config: what is asked for.
        part: the slice of the cells that is asked for.

    Raises:
        ValueError: the configuration, task or checkpoints cannot be used.
    """
    start = perf_counter()
    task = load_task(config.task, config.task_args)
    trajectory = trajectory_of(config.checkpoints, config.steps, config.clip_norm, config.batch_size)
    chosen = chosen_steps(trajectory, config.steps)
    usable, unusable = look(task, trajectory, config.posterior, chosen, SAMPLED in config.estimators)
    missing, steps = preflight(task, trajectory, config, list(usable)), list(usable)
    set_up = _set_up(config, task, trajectory, steps[-1])
    checks = perf_counter() - start  # the run makes the same
    workers, probes = Workers.of(config, task), list[Probe]()
    cost, notes = Cost((), workers), [repr(task)]
    with threads_of(workers):
        if SAMPLED in config.estimators:
            probes, room = measured(task, trajectory, config.posterior, config.sampling, steps)
            cost = priced(task, config.sampling, len(steps), workers, probes, room)
            notes += answered(config.posterior, probes)
            if len(looks := config.sampling.looks) > 1:
                notes.append(
                    f"draws: auto, priced as if each checkpoint took {looks[-1]:,}; many will end at {looks[0]:,}"
                )
        stages = [*estimator_costs(task, trajectory, config, steps, missing)]
        stages += retraining_costs(task, trajectory, config, steps)
    closing = closing_costs(task, config, len(steps), missing, probes) | reading_cost(task, config, steps, missing)
    notes += [*_other_machine(workers, task), NOT_PRICED, results_note(task, config, len(steps))]
    notes += [f"step {step} cannot be used: {reason}" for step, reason in unusable.items()]
    notes += [f"without {name}: {reason}" for name, reason in missing.items()]
    return replace(
        cost,
        stages=(*cost.stages, *stages),
        checks=checks,
        set_up=set_up,
        closing=closing,
        kept=ON_DISK * size_of(task, asked(task, config), len(steps)) * len(stages),
        moved=Moved.of(task, trajectory.load(steps[-1]), len(trajectory.steps)),
        part=part,
        notes=tuple(notes),
    )


def _set_up(config: RunConfig, task: Task, trajectory: Trajectory, step: int) -> float:
    """Seconds until a worker has made the task and knows that it is the same."""
    parts, known = identity(task, text=False), (step, probe(task, task.fitted(trajectory.load(step))))
    start = perf_counter()
    check_same_task(load_task(config.task, config.task_args), parts, trajectory, known)
    return perf_counter() - start


def _other_machine(workers: Workers, task: Task) -> list[str]:
    """What of the workers could not be tried here."""
    notes = []
    if workers.measured_with() < workers.threads:
        notes.append(
            f"measured with {workers.measured_with()} thread(s), as this machine has no more; a worker has "
            f"{workers.threads} and may be faster"
        )
    if workers.gpus and task.device.type == "cpu":
        notes.append("measured on the CPU, where the model lives here: with GPUs hours and memory are others")
    return notes
