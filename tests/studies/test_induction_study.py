"""Runs, and influence between classes of tokens, on a study so small that it takes seconds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.window_influence import window_influence
from stagewise.studies.induction.classes import CLASSES
from stagewise.studies.induction.experiments.boosting import boosting, reached
from stagewise.studies.induction.experiments.class_influence import checked_class_influence, class_influence, control
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.network import loss
from stagewise.studies.induction.settings import REDUCED
from stagewise.studies.induction.stages import Probes, induction, stages
from stagewise.studies.induction.training import EXCESS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), REDUCED)


def test_a_run_records_the_batches_it_was_trained_on(small):
    order = BatchOrder(REDUCED.sequences, REDUCED.batch_size, 1)
    coming = small.run(1).load(0).coming_batches
    assert len(coming) == REDUCED.last
    assert all(torch.equal(batch, order(step)) for step, batch in enumerate(coming))


def test_a_run_is_that_of_a_plain_loop_and_leaves_the_tasks_model_as_it_is(small):
    task, run = small.task(0), small.run(0)
    model = task.pure.reference({})
    optimizer = torch.optim.Adam(model.parameters(), lr=REDUCED.rate)
    for samples in run.load(0).coming_batches[:5]:
        optimizer.zero_grad()
        loss(model, small.data.train[samples]).mean().backward()
        optimizer.step()
    recorded, start = run.load(5).params, run.load(0).params
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(recorded[name], tensor)
        torch.testing.assert_close(start[name], task.state()[name])


def test_runs_of_two_seeds_share_their_data_and_nothing_else(small):
    first, second = (small.run(seed).load(0) for seed in (0, 1))
    assert not torch.equal(first.params["embedding.weight"], second.params["embedding.weight"])
    assert not torch.equal(first.coming_batches[0], second.coming_batches[0])
    assert torch.equal(small.task(0).train.batch(slice(3)), small.task(1).train.batch(slice(3)))


def test_a_recorded_run_is_read_and_not_made_again(small):
    small.run(0)
    before = {path: path.stat().st_mtime_ns for path in (small.folder / "seed-0").iterdir()}
    again = Lab(small.folder, REDUCED)
    assert isinstance(again.run(0), Trajectory)
    assert before == {path: path.stat().st_mtime_ns for path in (small.folder / "seed-0").iterdir()}


def test_a_folder_with_runs_of_other_settings_is_refused(small):
    small.run(0)
    with pytest.raises(ValueError, match="other settings"):
        Lab(small.folder, replace(REDUCED, data_seed=1)).run(0)
    assert Lab(small.folder, replace(REDUCED, window=3)).run(0).steps == REDUCED.steps


def test_probes_and_queries_are_not_of_the_training_set(small):
    seen = {tuple(row) for row in small.data.train.tolist()}
    assert not seen & {tuple(row) for row in small.data.probes.tokens.tolist()}
    assert not seen & {tuple(row) for row in small.data.queries.tolist()}


def test_the_loss_of_a_query_class_is_the_mean_over_its_tokens_alone(small):
    task, data = small.task(0), small.data
    every = loss(task.model, data.queries).detach().numpy()
    for name in CLASSES:
        values, weights = task.weighted_losses({}, task.queries[name].batch(slice(None)), name)
        mean = (values * weights).sum() / weights.sum()
        assert mean.item() == pytest.approx(every[data.query_classes == name].mean(), rel=1e-5)


def test_stages_have_every_measure_at_every_checkpoint_and_the_network_learns(small):
    found = small.stages(0)
    assert found["step"].values.tolist() == list(REDUCED.steps)
    assert all(np.isfinite(found[name].values).all() and "description" in found[name].attrs for name in found)
    assert found["kl_unigram"][-1] < found["kl_unigram"][0] / 2


def test_excess_is_the_distance_from_the_bigram_rule_that_the_stages_report(small):
    task, data = small.task(0), small.data
    probes = Probes.of(data.queries, REDUCED.vocabulary, torch.Generator().manual_seed(0))
    losses = task.losses({}, task.queries[EXCESS].batch(slice(None)), EXCESS)
    assert losses.mean().item() == pytest.approx(stages(task.model, probes)["kl_bigram"], rel=1e-4)


def test_induction_is_dated_by_the_rise_of_prefix_matching():
    scores = [0.0, 0.0, 0.01, 0.3, 0.5, 0.5]
    found = induction(xr.Dataset({"prefix_matching": ("step", scores)}, {"step": range(0, 60, 10)}))
    assert found.detail["half"] == pytest.approx(20 + 10 * (0.25 - 0.01) / 0.29)
    assert 20 < found.step < 30


def test_classes_of_the_control_have_the_sizes_of_the_real_ones_and_other_tokens(small, between_classes):
    step = [REDUCED.window_starts[0]]
    by_chance, real = control(small, 0, step), between_classes.exact.sel(step=step)
    assert by_chance["train_size"].values.tolist() == real["train_size"].values.tolist()
    everything = [(d["value"] * d["train_size"]).sum("train").sel(step=step[0]).values for d in (by_chance, real)]
    np.testing.assert_allclose(*everything, rtol=1e-3, atol=1e-7)
    assert np.abs(by_chance["value"] - real["value"]).max() > 1e-6


def test_windows_of_a_whole_run_begin_at_every_checkpoint_whose_batches_are_known_to_their_end(small):
    steps = class_influence(small)["step"].values.tolist()
    assert steps == [step for step in REDUCED.steps if step <= REDUCED.last - REDUCED.window]


@pytest.fixture(scope="module")
def between_classes(small):
    return checked_class_influence(small)


def test_exact_influence_of_a_class_is_what_a_small_change_of_its_weight_does(between_classes):
    for name in ("correlation", "slope"):
        np.testing.assert_allclose(between_classes.agreement[name], 1, atol=0.03)
    assert between_classes.exact.attrs["batches"] == "recorded"
    assert between_classes.measured.effect.dims == ("weight", "step", "train", "query")
    assert set(between_classes.exact["train"].values) == set(CLASSES)
    assert set(between_classes.exact["query"].values) == {*CLASSES, EXCESS}


def test_influence_of_a_class_is_the_mean_of_that_of_its_tokens(small, between_classes):
    step = REDUCED.window_starts[0]
    single = window_influence(small.task(0), small.run(0), window=REDUCED.window, per="token", steps=[step])
    of_tokens, classes = single["value"].sel(step=step).values, small.data.classes.ravel()
    for name in CLASSES:
        expected = between_classes.exact["value"].sel(step=step, train=name).values
        np.testing.assert_allclose(of_tokens[classes == name].mean(0), expected, rtol=1e-3, atol=1e-9)


def test_a_boost_changes_a_run_from_its_window_on_and_the_unchanged_run_is_the_recorded_one(small):
    found = boosting(small)
    assert found["run"].values.tolist() == ["unchanged", "induction 5", "induction 10", "chance 5", "chance 10"]
    unchanged = found.sel(run="unchanged")
    for step in found["step"].values.tolist():
        params = small.run(0).load(step).params
        losses = small.task(0).losses(params, small.task(0).queries[EXCESS].batch(slice(None)), EXCESS)
        assert unchanged.sel(step=step).item() == pytest.approx(losses.mean().item(), rel=1e-4)
    assert unchanged.sel(step=10).item() == found.sel(run="induction 10", step=10).item()
    for name in found["run"].values[1:]:
        assert abs(found.sel(run=name, step=15) - unchanged.sel(step=15)) > 1e-6
    assert abs(found.sel(run="chance 5", step=10) - found.sel(run="induction 5", step=10)) > 1e-6


def test_a_level_is_reached_between_the_looks_around_it_the_first_time():
    curves = [[0.4, 0.2, 0.0, 0.3], [0.4, 0.4, 0.4, 0.4], [0.0, 0.0, 0.0, 0.0]]
    excess = xr.DataArray(curves, {"run": list("abc"), "step": [0, 10, 30, 40]}, ("run", "step"))
    np.testing.assert_allclose(reached(excess, 0.05), [25, np.nan, np.nan])
