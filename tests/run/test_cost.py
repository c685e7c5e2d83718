"""What a dry run promises, with a clock that only moves when work is done."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import springs
import torch

from stagewise.checkpoints.directory import write_checkpoint
from stagewise.run import closing_cost, cost, estimator_cost, probe_cost
from stagewise.run.config import make_config
from stagewise.run.cost import Cost, answered, copies, estimate, sampling_cost
from stagewise.run.memory_cost import Room, most
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
    monkeypatch.setattr(cost, "peak", lambda: 0.0)
    monkeypatch.setattr(cost, "resident", lambda: 0.0)
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
    assert found.workers == workers


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
    monkeypatch.setattr(cost, "peak", lambda: next(peaks))
    monkeypatch.setattr(cost, "resident", lambda: next(residents))
    monkeypatch.setattr(cost, "most", lambda room, *_: seen.append(room) or 0.0)
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
    ("seconds", "shown"), [(59.4, "about 59 seconds"), (90.0, "about 1.5 minutes"), (7200.0, "about 120.0 minutes")]
)
def test_text_names_units_and_sizes(seconds, shown):
    text = Cost(6, {"sampling": seconds - 10, "the rest": 10.0}, 3.0 * 2**20, 5000.0 * 2**20, 2, 12345).text()
    assert "10 seconds  the rest" in text
    assert shown in text
    assert "6 cells (checkpoint x chain block), 12,345 sampler steps" in text
    assert "2 worker(s)" in text
    assert "about 3 MiB for each worker" in text
    assert "about 5,000 MiB of traces" in text


@pytest.fixture
def configured(tmp_path):
    run = springs.trajectory()
    for step in run.steps:
        write_checkpoint(tmp_path, run.load(step))
    content = {"task": f"{springs.__file__}:task", "checkpoints": str(tmp_path), "out": "o", "posterior": {"window": 3}}
    return content | {"sampling": {"chains": 5, "draws": 7, "blocks": 2, "batching": "loop"}}


def test_estimate_is_that_of_the_configured_steps_and_workers(clock, configured):
    assert estimate(make_config(configured)).cells == 6
    found = estimate(make_config(configured | {"steps": [10], "workers": 3}))
    assert (found.cells, found.workers) == (2, 3)


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
    assert found == {
        "exact influence at 3 checkpoints": 3 * (1 + 2 * 11 * 2),
        "gradient product at 3 checkpoints": 3 * 60,
    }
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

    assert (priced(False), priced(True)) == ({}, {"first order at 3 checkpoints": 21})


def test_retraining_is_priced_by_windows_orders_and_updates(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def retrained(*_, window, **settings):
        clock.now += 10 + 2 * window

    monkeypatch.setattr(estimator_cost, "time", clock)
    monkeypatch.setattr(closing_cost, "window_ablation", retrained)
    content = {"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": 11}}
    run, steps = springs.trajectory(), [0, 10, 20]

    def priced(**settings):
        return closing_cost.closing_costs(springs.task(), run, make_config(content | settings), steps, {}, [])

    assert priced() == {}
    assert priced(retraining={}) == {"retraining of 3 windows": 3 * 4 * (10 + 2 * 11)}
    assert priced(retraining={"window": 50, "repeats": 1}) == {"retraining of 3 windows": 3 * (10 + 2 * 50)}


def test_what_is_made_of_the_traces_is_priced_at_checkpoints_that_are_answered(configured):
    found = estimate(make_config(configured | {"estimators": ["bif"]}))
    assert found.parts["verdicts and influence from the chains"] > 0
    assert found.seconds == sum(found.parts.values())
    without = estimate(make_config(configured | {"estimators": ["gradient"]}))
    assert "sampling" not in without.parts
    assert "verdicts and influence from the chains" not in without.parts
