"""Runs, and influence between classes of tokens, on a study so small that it takes seconds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import query_groups
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.retraining.window_influence import window_influence
from stagewise.studies.induction import lab as lab_module
from stagewise.studies.induction.boosted import UNCHANGED, boosted, gained, reached
from stagewise.studies.induction.classes import CLASSES
from stagewise.studies.induction.influence import control, exact, gradients, of_classes, trained_again
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.network import loss
from stagewise.studies.induction.settings import Settings
from stagewise.studies.induction.stages import Probes, counts_best, induction, stages
from stagewise.studies.induction.training import EXCESS, LOSS
from stagewise.traces.files import RunFolderError

TINY = Settings(
    seeds=2,
    length=20,
    sequences=96,
    probes=24,
    width=8,
    batch_size=16,
    rate=5e-3,
    last=15,
    every=5,
    window=4,
    window_starts=(5, 10),
    weights=(0.95,),
    queries=12,
    boost_starts=(5, 10),
    boost_length=3,
)
"""As little as goes through all of it. No stage is reached."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), TINY)


def test_a_run_records_the_batches_it_was_trained_on(small):
    order = BatchOrder(TINY.sequences, TINY.batch_size, 1)
    coming = small.run(1).load(0).coming_batches
    assert len(coming) == TINY.last
    assert all(torch.equal(batch, order(step)) for step, batch in enumerate(coming))


def test_a_run_is_that_of_a_plain_loop_and_leaves_the_tasks_model_as_it_is(small):
    task, run = small.task(0), small.run(0)
    model = task.pure.reference({})
    optimizer = torch.optim.Adam(model.parameters(), lr=TINY.rate)
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
    again = Lab(small.folder, TINY)
    assert isinstance(again.run(0), Trajectory)
    assert before == {path: path.stat().st_mtime_ns for path in (small.folder / "seed-0").iterdir()}


def test_a_folder_with_runs_of_other_settings_is_refused(small):
    small.run(0)
    with pytest.raises(ValueError, match="other settings"):
        Lab(small.folder, replace(TINY, data_seed=1)).run(0)
    assert Lab(small.folder, replace(TINY, window=3)).run(0).steps == TINY.steps


def test_probes_and_queries_are_not_of_the_training_set(small):
    seen = {tuple(row) for row in small.data.train.tolist()}
    assert not seen & {tuple(row) for row in small.data.probes.tokens.tolist()}
    assert not seen & {tuple(row) for row in small.data.queries.tolist()}


def test_the_loss_of_a_query_class_is_the_mean_over_its_tokens_alone(small):
    task, data = small.task(0), small.data
    every = loss(task.model, data.queries).detach()
    groups = query_groups(task)
    assert groups.labels == (*(f"{LOSS}:{name}" for name in sorted(CLASSES)), EXCESS)
    means = groups.mean({LOSS: every.flatten(), EXCESS: torch.zeros(len(data.queries))})
    for name in CLASSES:
        found = means[groups.labels.index(f"{LOSS}:{name}")].item()
        assert found == pytest.approx(every.numpy()[data.query_classes == name].mean(), rel=1e-5)


def test_stages_have_every_measure_at_every_checkpoint_and_the_network_learns(small):
    found = small.stages(0)
    assert found["step"].values.tolist() == list(TINY.steps)
    assert all(np.isfinite(found[name].values).all() and "description" in found[name].attrs for name in found)
    assert found["kl_unigram"][-1] < found["kl_unigram"][0] / 2


def test_excess_is_the_distance_from_the_bigram_rule_that_the_stages_report(small):
    task, data = small.task(0), small.data
    probes = Probes.of(data.queries, TINY.vocabulary, torch.Generator().manual_seed(0))
    losses = task.losses({}, task.queries[EXCESS].batch(slice(None)), EXCESS)
    assert losses.mean().item() == pytest.approx(stages(task.model, probes)["kl_bigram"], rel=1e-4)


def test_induction_is_dated_by_the_rise_of_prefix_matching():
    scores = [0.0, 0.0, 0.01, 0.3, 0.5, 0.5]
    found = induction(xr.Dataset({"prefix_matching": ("step", scores)}, {"step": range(0, 60, 10)}))
    assert found.detail["half"] == pytest.approx(20 + 10 * (0.25 - 0.01) / 0.29)
    assert 20 < found.step < 30


def test_the_first_stage_ends_where_the_network_is_nearest_to_the_unigram_rule():
    found = xr.Dataset({"kl_unigram": ("step", [0.5, 0.1, 0.02, 0.3])}, {"step": [0, 3, 9, 30]})
    assert counts_best(found) == 9


def test_classes_of_the_control_have_the_sizes_of_the_real_ones_and_other_tokens(small):
    by_chance, real = control(small, 0), exact(small, 0)
    assert by_chance["train_size"].values.tolist() == real["train_size"].values.tolist()
    everything = [of_classes(one).sum("train") for one in (by_chance, real)]
    np.testing.assert_allclose(*everything, rtol=1e-3, atol=1e-6)
    assert np.abs(by_chance["value"] - real["value"]).max() > 1e-6


def test_windows_of_a_whole_run_begin_at_every_checkpoint_whose_batches_are_known_to_their_end(small):
    steps = exact(small, 0)["step"].values.tolist()
    assert steps == [step for step in TINY.steps if step <= TINY.last - TINY.window]


def test_exact_influence_of_a_class_is_what_a_small_change_of_its_weight_does(small):
    influence, measured = exact(small, 0), trained_again(small, 0)
    assert influence.attrs["batches"] == "recorded"
    assert measured.effect.dims == ("weight", "step", "train", "query")
    assert set(influence["train"].values) == set(CLASSES)
    scores = agreement(predicted_effect(influence, 0.95).effect, measured.effect.sel(weight=0.95))
    for name in ("correlation", "slope"):
        np.testing.assert_allclose(scores[name], 1, atol=0.03)


def test_products_of_gradients_are_of_the_same_classes_where_the_settings_windows_begin(small):
    found, influence = gradients(small, 0), exact(small, 0)
    assert found["step"].values.tolist() == list(TINY.window_starts)
    for name in ("train", "query", "train_size"):
        assert found[name].values.tolist() == influence[name].values.tolist()
    assert found.attrs["metric"] == "adam"


def test_influence_of_a_class_is_the_mean_of_that_of_its_tokens(small):
    step = TINY.window_starts[0]
    single = window_influence(small.task(0), small.run(0), window=TINY.window, per="token", steps=[step])
    of_tokens, classes = single["value"].sel(step=step).values, small.data.classes.ravel()
    for name in CLASSES:
        expected = exact(small, 0)["value"].sel(step=step, train=name).values
        np.testing.assert_allclose(of_tokens[classes == name].mean(0), expected, rtol=1e-3, atol=1e-9)


def refuse(*_, **__):
    raise AssertionError("computed again")


def test_a_result_that_is_kept_is_not_computed_again_and_has_the_same_numbers(small, monkeypatch):
    before = exact(small, 0)
    xr.testing.assert_identical(Lab(small.folder, TINY).kept("influence", 0, refuse), before)
    xr.testing.assert_identical(Lab(small.folder, replace(TINY, seeds=9)).kept("influence", 0, refuse), before)


@pytest.mark.parametrize("change", [{"window": 3}, {"queries": 11}])
def test_a_result_of_other_settings_or_another_seed_is_not_taken_for_this_one(small, change):
    exact(small, 0)
    with pytest.raises(AssertionError, match="computed again"):
        Lab(small.folder, replace(TINY, **change)).kept("influence", 0, refuse)
    with pytest.raises(AssertionError, match="computed again"):
        small.kept("influence", 7, refuse)


def test_a_result_of_other_numerics_is_computed_again(small, monkeypatch):
    exact(small, 0)
    monkeypatch.setattr(lab_module, "NUMERICS_VERSION", "another")
    with pytest.raises(AssertionError, match="computed again"):
        small.kept("influence", 0, refuse)


def test_a_damaged_result_is_named(tmp_path):
    lab = Lab(tmp_path, TINY)
    lab.kept("nothing", 0, xr.Dataset)
    (path,) = (tmp_path / "results").iterdir()
    path.write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=path.name):
        lab.kept("nothing", 0, xr.Dataset)


def test_a_run_that_ends_on_the_plateau_has_no_transition(small):
    assert small.transition(0) is None


def test_a_boost_changes_a_run_from_its_window_on_and_the_unchanged_run_is_the_recorded_one(small):
    found = boosted(small, 0)
    assert found["run"].values.tolist() == ["unchanged", "induction 5", "induction 10", "chance 5", "chance 10"]
    unchanged = found.sel(run=UNCHANGED)
    for step in found["step"].values.tolist():
        params = small.run(0).load(step).params
        losses = small.task(0).losses(params, small.task(0).queries[EXCESS].batch(slice(None)), EXCESS)
        assert unchanged.sel(step=step).item() == pytest.approx(losses.mean().item(), rel=1e-4)
    assert unchanged.sel(step=10).item() == found.sel(run="induction 10", step=10).item()
    for name in found["run"].values[1:]:
        assert abs(found.sel(run=name, step=15) - unchanged.sel(step=15)) > 1e-6
    assert abs(found.sel(run="chance 5", step=10) - found.sel(run="induction 5", step=10)) > 1e-6


def test_steps_gained_are_how_much_earlier_a_boosted_run_is_half_way_from_the_plateau_to_the_end(small):
    names = [UNCHANGED, "induction 5", "induction 10", "chance 5", "chance 10"]
    fall = np.linspace(1.5, 0, 31)[None].repeat(5, 0) * small.plateau  # half-way at step 20
    for row, earlier in enumerate([0, 4, 2, 1, 0]):
        fall[row] = np.maximum(fall[row] - 0.05 * earlier * small.plateau, 0)
    found = gained(small, xr.DataArray(fall, {"run": names, "step": range(31)}, ("run", "step")))
    np.testing.assert_allclose(found["induction"], [4, 2], atol=1e-9)
    np.testing.assert_allclose(found["chance"], [1, 0], atol=1e-9)


def test_a_level_is_reached_between_the_looks_around_it_the_first_time():
    curves = [[0.4, 0.2, 0.0, 0.3], [0.4, 0.4, 0.4, 0.4], [0.0, 0.0, 0.0, 0.0]]
    excess = xr.DataArray(curves, {"run": list("abc"), "step": [0, 10, 30, 40]}, ("run", "step"))
    np.testing.assert_allclose(reached(excess, 0.05), [25, np.nan, np.nan])
