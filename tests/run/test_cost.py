"""What a dry run promises, with a clock that only moves when work is done."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import springs
import torch

from stagewise.checkpoints.directory import write_checkpoint
from stagewise.run import chains_cost, closing_cost, estimator_cost, probe_cost
from stagewise.run.chains_cost import answered, copies, sampling_cost
from stagewise.run.config import make_config
from stagewise.run.cost import estimate
from stagewise.run.executors import Ray
from stagewise.run.memory_cost import Room, most
from stagewise.run.moved_cost import Moved
from stagewise.run.priced import Cost
from stagewise.run.slices import Slice
from stagewise.run.spread_cost import Priced, Workers
from stagewise.sampling import tuning
from stagewise.sampling.block import Block
from stagewise.sampling.chains import Chains
from stagewise.sampling.curvature import extreme_curvature
from stagewise.sampling.posterior import LocalPosterior, largest_window
from stagewise.sampling.watch import Watch

SAMPLING = Chains(chains=5, draws=7, blocks=2, burn_in=11, thinning=3, batching="loop")
SAMPLES = len(springs.TRAIN) + len(springs.NEAR) + len(springs.FAR)


@pytest.fixture
def clock(monkeypatch):
    """2 s for tuning, 3 s for a gradient of all chains, 5 s for a draw; nothing for a file."""
    clock = SimpleNamespace(now=100.0)

    def takes(seconds, call):
        def timed(*args):
            clock.now += seconds
            return call(*args)

        return timed

    monkeypatch.setattr(probe_cost, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(tuning, "pilot", lambda density, *_: (density, None))  # whose draws are not the chains'
    monkeypatch.setattr(probe_cost, "tune", takes(2, probe_cost.tune))
    monkeypatch.setattr(Block, "step", takes(3, Block.step))
    monkeypatch.setattr(Watch, "draw", takes(5, Watch.draw))
    monkeypatch.setattr(chains_cost, "peak", lambda: 0.0)
    monkeypatch.setattr(chains_cost, "resident", lambda: 0.0)
    return clock


def predicted(task=None, sampling=SAMPLING, steps=(0, 10, 20), workers=1, posterior=None):
    posterior = posterior or LocalPosterior(window=3)
    return sampling_cost(task or springs.task(), springs.trajectory(), posterior, sampling, steps, workers)


def test_time_is_that_of_tuning_gradients_and_draws_of_all_cells(clock):
    per_cell = 2 + (11 + 7 * 3) * 3 + 7 * 5
    assert predicted().seconds == per_cell * 6
    assert predicted(steps=[10]).seconds == per_cell * 2


def test_draws_that_end_when_they_are_precise_are_priced_as_if_they_never_were(clock):
    auto = replace(SAMPLING, draws="auto", most_draws=100, blocks=1)
    assert predicted(sampling=auto) == predicted(sampling=replace(auto, draws=100))


@pytest.mark.parametrize(("workers", "rounds"), [(2, 3), (4, 2), (5, 2), (50, 1)])
def test_workers_share_cells_in_rounds_and_no_cell_is_shared(clock, workers, rounds):
    found = predicted(workers=workers)
    assert found.seconds == pytest.approx(predicted().seconds / 6 * rounds)
    assert found.workers.count == workers


def test_cells_and_sampler_steps_are_counted_over_checkpoints_and_blocks(clock):
    found = predicted(steps=[0, 20])
    assert found.cells == 4
    assert found.steps == 4 * (11 + 7 * 3)


@pytest.mark.parametrize(
    ("loss", "reflect", "numbers"), [(springs.losses, True, 2), (springs.losses, False, 1), (springs.by_token, True, 4)]
)
def test_memory_and_disk_follow_the_number_of_losses_that_are_kept(clock, loss, reflect, numbers):
    sampling = Chains(chains=5, draws=7, blocks=2, burn_in=11, thinning=3, batching="loop", reflect=reflect)
    found = predicted(springs.task(loss), sampling)
    traces = 4 * 5 * 7 * SAMPLES * numbers  # float32
    assert found.disk > 6 * 0.8 * traces  # noise cannot be compressed
    # Draws and traces in double precision beside them; then the largest array, of the training set, once more or twice
    # as it is written.
    largest = 5 * 7 * len(springs.TRAIN) * (2 if loss is springs.by_token else 1)
    writing = max(8 * largest, found.disk / 6 + 4 * largest)
    assert found.memory == pytest.approx(3 * traces + writing)


def test_memory_is_of_the_chains_while_they_move_where_that_is_more_than_a_cell_that_is_written():
    cell = most(Room(0, 0), 0, [100, 50], 600)
    assert cell == (8 + 4) * 150 + 600 + 4 * 100
    assert most(Room(0, 0), 0, [100, 50], 100) == (8 + 4) * 150 + 8 * 100
    assert most(Room(5000, 0), 0, [100, 50], 600) == 5000 + 4 * 150
    assert most(Room(5000, 0), 7000, [100, 50], 600) == 7000 + 4 * 150
    assert most(Room(5000, 4000), 0, [100, 50], 600) == 4000 + cell
    assert most(Room(5000, 4000), 7000, [], 0) == 7000


def test_what_steps_took_and_what_of_it_stayed_are_told_apart(clock, monkeypatch):
    """Libraries that are loaded meanwhile are there while a cell is written, what a step needed is not."""
    peaks, residents, seen = iter([3e6, 8e6]), iter([2e6, 6e6]), []
    monkeypatch.setattr(chains_cost, "peak", lambda: next(peaks))
    monkeypatch.setattr(chains_cost, "resident", lambda: next(residents))
    monkeypatch.setattr(chains_cost, "most", lambda room, *_: seen.append(room) or 0.0)
    predicted()
    assert seen == [Room(5e6, 4e6)]


def test_chains_of_a_large_model_need_few_copies_of_it():
    assert copies(SAMPLING, 10**7) == 6 + 8 + 2 * 5


def test_independent_draws_need_no_burn_in_and_keep_the_vectors_behind_them(clock):
    found = predicted(sampling=Chains("window", chains=5, draws=7), steps=[0, 20])
    assert found.steps == 2 * 7
    assert found.seconds == 2 * (2 + 7 * 3 + 7 * 5)
    assert copies(Chains("window", chains=5), 10**5) == 6 + 4 + (8 + 40) * 5
    assert copies(Chains("window", chains=5), 10**7) == 6 + 4 + 8 + 2 * 5


def test_updates_that_run_away_cost_their_tuning_only(clock):
    saddle = springs.task(lambda model, batch: -30 * springs.losses(model, batch))
    assert predicted(saddle, Chains("window", chains=5, draws=7), posterior=LocalPosterior(window=60)).steps == 0


def test_a_checkpoint_without_a_posterior_costs_its_tuning_only(clock):
    saddle = springs.task(lambda model, batch: -springs.losses(model, batch))
    found = predicted(saddle, posterior=LocalPosterior(gamma=0.1, n_beta=1.0))
    assert found.steps == 0
    assert found.seconds == 2 * 6


def test_threads_are_those_of_one_worker_and_given_back_afterwards(clock, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    predicted(workers=2)
    assert threads == [4, 8]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(39.4, "about 39 seconds"), (90.0, "about 1.5 minutes"), (7200.0, "about 2.0 hours")]
)
def test_text_names_units_and_sizes(seconds, shown):
    stages = (Priced("sampling", 6, (seconds - 10) / 3),)
    text = Cost(stages, Workers(2), 3.0 * 2**20, 5000.0 * 2**20, 12345, closing={"the rest": 10.0}).text()
    assert "10 seconds  the rest" in text
    assert shown in text
    assert "6 cells in 1 stage(s), 12,345 sampler steps" in text
    assert "2 worker(s) here, 1 thread(s) each" in text
    assert "about 3 MiB for each worker" in text
    assert "about 4.9 GiB of traces" in text


def test_cells_of_all_stages_are_spread_and_what_one_process_does_is_not():
    stages = (Priced("a", 3, 10.0), Priced("b", 2, 4.0), Priced("c", 1, 7.0, later=True))
    cost = Cost(stages, Workers(2), checks=5.0, set_up=1.0, closing={"reading": 6.0})
    # 10, 10 | 10 and 4, 4: 20 s and 18 s; what is known to be needed later begins when all others are complete.
    assert cost.parts == {"checks before the work": 5.0, "reading": 6.0, "cells": 1 + 20 + 1 + 7}
    assert replace(cost, workers=Workers(1)).parts["cells"] == 38 + 7, "this process makes no other"
    assert cost.with_workers(100) == 5 + 6 + 1 + 10 + 1 + 7
    assert cost.least == 5 + 6 + 10 + 7
    assert "0.013 worker-hours" in cost.text()  # 45 seconds
    one = Slice(1, 2)  # cells 1, 3 and 5: 10, 10 and 4
    assert cost.of_slice(one) == 5 + 1 + 14
    assert "slice   1/2: 3 cells, about 20 seconds" in replace(cost, part=one).text()


def test_jobs_are_dealt_cells_beforehand_and_hold_their_cores_until_the_last_of_theirs():
    jobs = Workers(4, gpus=1, jobs=2, away=True)  # two workers in each
    assert jobs.walls([9, 1, 9, 1, 9, 1]) == [18, 2]
    assert jobs.held([9, 1, 9, 1, 9, 1]) == 2 * (18 + 2)
    assert replace(jobs, jobs=0).wall([9, 1, 9, 1, 9, 1]) == 10, "whoever is free takes the next one"
    assert replace(jobs, jobs=0).held([9, 1, 9, 1, 9, 1]) == 30
    text = Cost((Priced("a", 8, 3600.0),), jobs).text()
    assert "8 worker-hours for the cells, 8 core-hours, 4 job-hours, 8 GPU-hours" in text


@pytest.mark.parametrize(
    ("settings", "count", "threads", "gpus", "jobs"),
    [
        ({"workers": 2}, 2, 4, 0, 0),
        ({"workers": 1}, 1, 8, 0, 0),
        ({"workers": 1, "executor": {"name": "local", "threads": 3}}, 1, 3, 0, 0),
        ({"workers": 2, "executor": {"name": "local", "threads": 3}}, 2, 3, 0, 0),
        ({"workers": 5, "executor": {"name": "ray", "cpus": 6, "gpus": 0.5}}, 5, 6, 0.5, 0),
        ({"executor": {"name": "slurm", "jobs": 3, "cpus": 4}}, 12, 1, 0, 3),
        ({"executor": {"name": "slurm", "jobs": 3, "cpus": 8, "gpus": 2}}, 6, 4, 1, 3),
        ({"workers": 6, "executor": {"name": "slurm", "cpus": 4}}, 8, 1, 0, 2),
        ({"workers": 6, "executor": {"name": "slurm", "jobs": 3, "cpus": 4}}, 12, 1, 0, 3),
    ],
)
def test_workers_threads_and_gpus_are_those_of_the_executor(settings, count, threads, gpus, jobs, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    content = {"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": 3}}
    found = Workers.of(make_config(content | settings), springs.task())
    assert (found.count, found.threads, found.gpus, found.jobs) == (count, threads, gpus, jobs)
    assert found.processes == (0 if count == 1 else count)


def test_workers_of_ray_are_as_many_as_the_cluster_has_room_for_where_nobody_says_how_many(monkeypatch):
    monkeypatch.setattr(Ray, "room", lambda _: 7)
    content = {"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": 3}, "executor": "ray"}
    assert Workers.of(make_config(content), springs.task()).count == 7


def test_every_process_reads_the_data_every_cell_its_checkpoint_and_a_driver_all():
    task, run = springs.task(), springs.trajectory()
    found = Moved.of(task, run.load(10), 3)
    assert found.data == sum(t.nbytes for data in (task.train, *task.queries.values()) for t in data.batch(slice(None)))
    checkpoint = run.load(10)
    held = [*checkpoint.params.values(), *checkpoint.first_moment.values(), *checkpoint.second_moment.values()]
    assert found.checkpoint == sum(tensor.nbytes for tensor in held) > 0
    assert Moved(100, 7, 3).read(workers=2, cells=5, whole=1, drivers=2) == 7 * 4 + 100 * (2 * 3 + 3 + 2 + 5)


@pytest.fixture
def configured(tmp_path):
    run = springs.trajectory()
    for step in run.steps:
        write_checkpoint(tmp_path, run.load(step))
    content = {"task": f"{springs.__file__}:task", "checkpoints": str(tmp_path), "out": "o", "posterior": {"window": 3}}
    return content | {"sampling": {"chains": 5, "draws": 7, "blocks": 2, "batching": "loop"}}


def test_estimate_is_that_of_the_configured_steps_and_workers(clock, configured):
    assert estimate(make_config(configured)).stages[0].cells == 6
    found = estimate(make_config(configured | {"steps": [10], "workers": 3}))
    assert (found.stages[0].cells, found.workers.count) == (2, 3)


def test_estimate_refuses_a_step_without_checkpoint_as_the_run_does(configured):
    with pytest.raises(ValueError, match=r"steps \[7\] have no checkpoint"):
        estimate(make_config(configured | {"steps": [7]}))
    with pytest.raises(ValueError, match="no checkpoint"):
        estimate(make_config(configured | {"steps": []}))


def test_checkpoints_that_a_window_can_answer_are_counted_before_any_sampling():
    saddle, posterior = springs.task(lambda model, batch: -springs.losses(model, batch)), LocalPosterior(window=8)
    probes = [probe_cost.probe(saddle, springs.trajectory(), posterior, SAMPLING, step) for step in (0, 10, 20)]
    (note,) = answered(posterior, probes)
    counts = {int(window): int(count) for window, count in re.findall(r"(\d+) steps: (\d+)", note)}
    longest = [
        largest_window(extreme_curvature(LocalPosterior(window=8).at(saddle, c)).smallest, c.optimizer, c.coming_rates)
        for c in map(springs.trajectory().load, [0, 10, 20])
    ]
    assert counts == {window: sum(most >= window for most in longest) for window in (2, 4, 8, 16)}
    assert min(counts.values()) < max(counts.values()), "the windows tell nothing apart"
    assert answered(LocalPosterior(gamma=1.0), probes) == []


def test_exact_influence_is_priced_by_updates_orders_and_checkpoints_and_others_by_checkpoints(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    asked = []

    def estimate(name, *_):
        def compute(window=0, **settings):
            asked.append((name, window))
            clock.now += 1 + 2 * window if name == "exact" else 60
            return settings

        return compute

    monkeypatch.setattr(estimator_cost, "time", clock)
    monkeypatch.setattr(estimator_cost, "estimate", estimate)
    content = {"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": 11}}
    settings = {"estimators": ["exact", "gradient"], "retraining": {"repeats": 2}}
    config = make_config(content | settings)
    found = estimator_cost.estimator_costs(springs.task(), springs.trajectory(), config, [0, 10, 20], {})
    # Three checkpoints; in each two fresh orders of 11 updates of 2 seconds, and one second for all.
    assert found == [Priced("exact influence", 3, 1 + 2 * 11 * 2), Priced("gradient product", 3, 60)]
    assert asked == [("exact", 1), ("exact", 1), ("exact", 1), ("exact", 3), ("exact", 3), ("gradient", 0)]
    assert "2 groups x 3 queries" in estimator_cost.results_note(springs.task(), config, 3)


def test_first_order_of_chains_that_record_it_is_priced_also_where_there_is_none(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def refused(steps):
        clock.now += 7
        raise ValueError("negative curvature")

    monkeypatch.setattr(estimator_cost, "time", clock)
    monkeypatch.setattr(estimator_cost, "solver", lambda *_: refused)
    content = {"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": 11}, "estimators": ["bif"]}

    def priced(linear):
        config = make_config(content | {"sampling": {"linear": linear}})
        return estimator_cost.estimator_costs(springs.task(), springs.trajectory(), config, [0, 10, 20], {})

    assert (priced(False), priced(True)) == ([], [Priced("first order", 3, 7)])


def test_retraining_is_priced_by_windows_orders_and_updates(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def retrained(*_, window, **settings):
        clock.now += 10 + 2 * window

    monkeypatch.setattr(estimator_cost, "time", clock)
    monkeypatch.setattr(closing_cost, "window_ablation", retrained)
    content = {"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": 11}}
    run, steps = springs.trajectory(), [0, 10, 20]

    monkeypatch.setattr(closing_cost, "train", lambda *args: setattr(clock, "now", clock.now + len(args[-1])))

    def priced(**settings):
        return closing_cost.retraining_costs(springs.task(), run, make_config(content | settings), steps)

    assert priced() == []
    repeated = Priced("repeating the run", 1, 0.0, whole=True)  # the batches are not known: nothing is repeated
    assert priced(retraining={}) == [Priced("retraining windows", 3, 4 * (10 + 2 * 11)), repeated]
    of_run = {"window": 50, "repeats": 1, "recorded_order_seed": 0}
    known = [Priced("retraining windows", 3, 10 + 2 * 50), repeated._replace(seconds=20.0)]  # updates 0 to 20
    assert priced(retraining=of_run) == known


def test_what_is_made_of_the_traces_is_priced_at_checkpoints_that_are_answered(configured):
    found = estimate(make_config(configured | {"estimators": ["bif"]}))
    assert found.parts["verdicts and influence from the chains"] > 0
    assert found.seconds == sum(found.parts.values())
    without = estimate(make_config(configured | {"estimators": ["gradient"]}))
    assert [stage.stage for stage in without.stages] == ["gradient product"]
    assert "verdicts and influence from the chains" not in without.parts
