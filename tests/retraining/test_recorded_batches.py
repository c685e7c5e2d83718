"""Windows and replays with the batches that a run has recorded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import classifier

from stagewise.checkpoints.recorder import Recorder
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.replay import LIKE_RUN, replay
from stagewise.retraining.schedule import BatchOrder, RecordedOrder

N, SIZE = 60, 16
STEPS = (0, 5, 12)


@pytest.fixture(scope="module")
def task():
    return classifier()


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    """Adam in a plain loop over a loader whose last batch of an epoch has 12 samples, not 16."""
    model = classifier().model
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    folder = tmp_path_factory.mktemp("run")
    record = Recorder(folder, model, adam, STEPS, batch_size=SIZE)
    x, y = task.train.batch(slice(None))
    loader = torch.utils.data.DataLoader(range(N), SIZE, shuffle=True, generator=torch.Generator().manual_seed(4))
    step = 0
    record(step)
    while step < STEPS[-1]:
        for index in loader:
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            adam.step()
            step += 1
            record(step, index)
    return Trajectory.from_directory(folder)


def changed(run, **changes):
    """The same run with other facts in every checkpoint."""
    return Trajectory.from_checkpoints(
        replace(c, coming_batches=(), **{name: change(c) for name, change in changes.items()})
        for c in map(run.load, run.steps)
    )


def without_batches(run):
    return changed(run, batches=lambda _: ())


def of_size(size):
    return lambda checkpoint: replace(checkpoint.optimizer, batch_size=size)


def sizes(run):
    return [len(batch) for batch in run.load(0).coming_batches]


def test_a_plain_loop_that_hands_over_its_indices_is_repeated_without_passing_anything(task, run):
    assert sizes(run) == [16, 16, 16, 12] * 3
    got = replay(task, run)
    assert got.step.values.tolist() == [0, 5]
    assert (got.miss < 1e-10).all()
    assert got.attrs["verdict"].startswith("the replay repeats the run")
    assert replay(task, without_batches(run)).attrs["verdict"] == LIKE_RUN


@pytest.mark.parametrize("size", [None, 0, 8])
def test_what_the_run_did_counts_and_not_the_batch_size_that_was_written_down(task, run, size):
    assert (replay(task, changed(run, optimizer=of_size(size))).miss < 1e-10).all()


def test_an_order_that_is_given_is_used_instead_of_the_recorded_one(task, run):
    assert (replay(task, run, BatchOrder(N, SIZE, seed=9)).miss > 0.01).all()


def test_a_window_has_the_runs_own_batches_as_its_first_order(task, run):
    """The unchanged replay of the window ends where the run ended, so that effects are against the run itself."""
    batches = run.load(5).coming_batches
    got = window_ablation(task, run, window=7, steps=[5])
    by_hand = window_ablation(task, without_batches(run), window=7, steps=[5], order=RecordedOrder(5, batches))
    np.testing.assert_array_equal(got.effect, by_hand.effect)
    fresh = window_ablation(task, without_batches(run), window=7, steps=[5])
    assert not np.allclose(got.effect, fresh.effect, rtol=1e-3)
    kinds = [each.attrs["batches"] for each in (got, by_hand, fresh)]
    assert kinds == ["recorded", "given", "fresh"]


def test_the_other_orders_are_the_fresh_ones_of_the_full_batch_size(task, run):
    settings = {"window": 2, "seed": 3}
    own = RecordedOrder(5, run.load(0).coming_batches[3:5])
    assert [len(batch) for batch in own.batches] == [12, 16]  # the small batch of an epoch's end comes first
    start = run.load(5).followed_by((), own.batches)
    got = window_ablation(task, Trajectory.from_checkpoints([start]), repeats=3, **settings)
    assert got.attrs["batches"] == "recorded and fresh"
    seeds = np.random.SeedSequence(3).generate_state(3)[1:]
    orders = [own, *(BatchOrder(N, SIZE, int(seed)) for seed in seeds)]
    bare = Trajectory.from_checkpoints([replace(start, optimizer=of_size(None)(start))])
    effects = [window_ablation(task, bare, order=order, **settings).effect for order in orders]
    np.testing.assert_allclose(got.effect, np.mean(effects, axis=0), rtol=1e-9)


@pytest.mark.parametrize(
    ("window", "repeats", "kind"),
    [(5, 1, "recorded and fresh"), (5, 2, "recorded and fresh"), (13, 2, "fresh")],
)
def test_a_window_that_recorded_batches_do_not_cover_has_fresh_ones(task, run, window, repeats, kind):
    assert window_ablation(task, run, window=window, repeats=repeats).attrs["batches"] == kind  # step 12 has none


def test_a_batch_of_everything_is_said_to_be_the_whole_training_set(task, run):
    whole = changed(run, batches=lambda _: (), optimizer=of_size(0))
    assert window_ablation(task, whole, window=2, repeats=3).attrs["batches"] == "whole training set"


def test_recorded_batches_stand_in_for_an_unknown_batch_size(task, run):
    unknown = changed(run, optimizer=of_size(None))
    got, known = (window_ablation(task, this, window=5, repeats=2) for this in (unknown, run))
    assert got.step.values.tolist() == [0, 5, 12]  # of the last the updates before it are known
    np.testing.assert_array_equal(got["effect"], known["effect"])
    without = changed(run, optimizer=of_size(None), batches=lambda _checkpoint: ())
    with pytest.raises(ValueError, match="step 0: .*does not say how many samples"):
        window_ablation(task, without, window=5, repeats=2)


def test_batches_of_a_larger_training_set_are_refused_wherever_in_the_window_they_are(task, run):
    def moved(checkpoint):
        return (*checkpoint.batches[:-1], torch.tensor([3, N])) if checkpoint.batches else ()

    other = changed(run, batches=moved)
    with pytest.raises(ValueError, match=r"from step 0 on names sample 60, expected indices from 0 to 59"):
        window_ablation(task, other, window=5, steps=[0])
    assert "names sample 60" in replay(task, other).verdict.values[0]
    window_ablation(task, other, window=4, steps=[0])  # that far all is well


def test_an_update_that_was_not_recorded_is_named():
    order = RecordedOrder(10, (torch.tensor([4, 1]), torch.tensor([3])))
    assert [order(step).tolist() for step in (10, 11)] == [[4, 1], [3]]
    for step in (9, 12):
        with pytest.raises(ValueError, match=f"made at step {step} are not known: .* 2 updates from step 10 on"):
            order(step)
    with pytest.raises(ValueError, match="got none"):
        RecordedOrder(10, ())
