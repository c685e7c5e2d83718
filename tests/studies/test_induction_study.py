"""Runs, and influence between classes of tokens, on a study so small that it takes seconds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.groups import query_groups
from stagewise.influence.gradients import gradient_product
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.scores import agreement, predicted_effect
from stagewise.retraining.window_influence import window_influence
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies import runs as runs_module
from stagewise.studies.effects import of_classes, trained_again
from stagewise.studies.estimators import damped, gradients
from stagewise.studies.induction import arms as arms_module
from stagewise.studies.induction import influence as influence_module
from stagewise.studies.induction.arms import (
    ARMS,
    CHANCE,
    NAMED,
    UNCHANGED,
    arms,
    chosen,
    formed,
    forming,
    kinds,
    named,
    trained,
)
from stagewise.studies.induction.classes import CLASSES
from stagewise.studies.induction.influence import control, exact, exact_at_starts
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.network import loss
from stagewise.studies.induction.settings import Settings
from stagewise.studies.induction.stages import Probes, counts_best, induction, stages
from stagewise.studies.induction.training import EXCESS, LOSS
from stagewise.studies.measures import divergence
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
    part=64,
    solved=(10,),
    sampled=(10,),
    sampled_window=1,
    until=15,
    choose_every=5,
    look_every=5,
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
    asked = {"window": 3, "window_starts": (5,), "part": 8, "solved": (), "sampled": (), "sampled_window": 2}
    assert Lab(small.folder, replace(TINY, **asked)).run(0).steps == TINY.steps


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
    own = exact_at_starts(small, 0)
    assert own["step"].values.tolist() == list(TINY.window_starts)
    xr.testing.assert_identical(exact(small, 0)["value"].sel(step=own["step"]), own["value"])


def test_exact_influence_of_a_class_is_what_a_small_change_of_its_weight_does(small):
    influence, measured = exact(small, 0), trained_again(small, 0)
    assert influence.attrs["batches"] == "recorded"
    assert measured.effect.dims == ("weight", "step", "train", "query")
    assert set(influence["train"].values) == set(CLASSES)
    scores = agreement(predicted_effect(influence, 0.95).effect, measured.effect.sel(weight=0.95))
    for name in ("correlation", "slope"):
        np.testing.assert_allclose(scores[name], 1, atol=0.03)


def test_estimators_of_the_checkpoint_are_of_the_same_classes_where_the_settings_ask_for_them(small):
    influence = exact(small, 0)
    for found, starts in ((gradients(small, 0), TINY.window_starts), (damped(small, 0), TINY.solved)):
        assert found["step"].values.tolist() == list(starts)
        assert set(found["train"].values) == set(CLASSES)
        assert found["query"].values.tolist() == influence["query"].values.tolist()
        assert found.attrs["metric"] == "adam"
        assert found.attrs["window"] == TINY.window


def test_a_part_of_the_training_set_is_evenly_spaced_and_stands_for_all(small):
    rows = [row for row in range(TINY.sequences) if row % 3 < 2]
    assert torch.equal(small.part(0).train.batch(slice(None)), small.data.train[rows])
    assert torch.equal(small.task(0).train.batch(slice(None)), small.data.train)
    found, posterior = gradients(small, 0), LocalPosterior(window=TINY.window)
    for name, size in zip(found["train"].values, found["train_size"].values, strict=True):
        assert size == (small.data.classes[rows] == name).sum()
    whole = gradient_product(small.task(0), small.run(0), posterior, steps=TINY.window_starts)
    own, of_all = (of_classes(one).sel(train=found["train"]).values.ravel() for one in (found, whole))
    assert own @ of_all / (of_all @ of_all) == pytest.approx(1, abs=0.2)  # by its own size it would be 2/3 or 3/2


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
    before = control(small, 0)
    monkeypatch.setattr(influence_module, "window_influence", refuse)
    for settings in (TINY, replace(TINY, seeds=9)):
        xr.testing.assert_identical(control(Lab(small.folder, settings), 0), before)


@pytest.mark.parametrize("change", [{"window": 3}, {"queries": 11}])
def test_a_result_of_other_settings_or_another_seed_is_not_taken_for_this_one(small, change):
    control(small, 0)
    with pytest.raises(AssertionError, match="computed again"):
        Lab(small.folder, replace(TINY, **change)).kept("influence-elsewhere", 0, refuse)
    with pytest.raises(AssertionError, match="computed again"):
        small.kept("influence-elsewhere", 7, refuse)


def test_a_result_of_other_numerics_is_computed_again(small, monkeypatch):
    control(small, 0)
    monkeypatch.setattr(runs_module, "NUMERICS_VERSION", "another")
    with pytest.raises(AssertionError, match="computed again"):
        small.kept("influence-elsewhere", 0, refuse)


def test_a_damaged_result_is_named(tmp_path):
    lab = Lab(tmp_path, TINY)
    lab.kept("nothing", 0, xr.Dataset)
    (path,) = (tmp_path / "results").iterdir()
    path.write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=path.name):
        lab.kept("nothing", 0, xr.Dataset)


def test_a_run_that_ends_on_the_plateau_has_no_transition(small):
    assert small.transition(0) is None


WINDOW = range(8, 11)
"""As if induction formed in these updates of every run, which are too few to learn it."""


def test_induction_forms_from_its_onset_to_half_of_its_rise_and_nowhere_if_it_is_not_learnt(small, monkeypatch):
    assert forming(small, 0) is None
    with pytest.raises(ValueError, match="seed 0 does not learn induction"):
        trained(small, 0, NAMED)
    found = induction(xr.Dataset({"prefix_matching": ("step", [0.0, 0.02, 1.0])}, {"step": [0, 10, 30]}))
    monkeypatch.setattr(Lab, "transition", lambda *_: found)
    assert forming(small, 0) == range(round(found.step), round(found.detail["half"]))


def test_the_weight_that_is_moved_is_the_same_in_every_arm_and_the_mean_stays_one(small):
    ways = arms(small, 0, WINDOW)
    assert list(ways) == list(ARMS)
    for name, arm in ways.items():
        moved, last = 0.0, (*arm.decisions[1:], TINY.until)
        schedules = [arm.schedule(small.run(0).load(step // 5 * 5)) for step in arm.decisions]
        for schedule, first, stop in zip(schedules, (0, *arm.decisions[1:]), last, strict=True):
            for step in range(first, stop):
                weights = schedule.weights(step, TINY.sequences)
                assert weights.mean().item() == pytest.approx(1, abs=1e-6)
                moved += 1 - weights.min().item()  # the lowest weight is what is left of 1
        by_batches = name in (UNCHANGED, "replaced, while it forms")
        assert moved == pytest.approx(0 if by_batches else TINY.budget * len(WINDOW), abs=1e-5), name
    of_kinds = [named(small, 0, step) for step in (WINDOW.start, TINY.last)]
    assert not torch.equal(*of_kinds)


def test_the_named_kinds_are_those_that_the_curriculum_gives_more_weight_at_the_checkpoint(small):
    weights, (names, places) = named(small, 1, 12), kinds(small)
    torch.testing.assert_close(weights, chosen(small, 1, small.run(1).load(10)))
    assert set(names) == {f"{name} {third}" for name in CLASSES for third in ("first", "middle", "last")} & set(names)
    labels = names[places]
    assert (np.char.partition(labels, " ")[..., 0] == small.data.classes).all()
    assert np.char.endswith(labels[:, 0], " first").all()
    assert np.char.endswith(labels[:, -1], " last").all()


def test_tokens_drawn_by_chance_have_the_same_weights_at_every_place_and_are_others(small):
    ways = arms(small, 0, WINDOW)
    own, chance = (ways[name].schedule(None).weights(WINDOW.start, TINY.sequences) for name in (NAMED, CHANCE))
    assert torch.equal(own.sort(0).values, chance.sort(0).values)
    assert not torch.equal(own, chance)


def test_half_of_each_batch_is_replaced_while_it_forms_by_the_sequences_with_most_named_tokens(small):
    arm, order = arms(small, 0, WINDOW)["replaced, while it forms"], BatchOrder(TINY.sequences, TINY.batch_size, 0)
    weights = named(small, 0, WINDOW.start)
    others = []
    for step in range(TINY.until):
        kept = TINY.batch_size // 2 if step in WINDOW else 0
        assert torch.equal(arm.order(step)[kept:], order(step)[kept:])
        others += arm.order(step)[:kept].tolist()
    assert weights[others].mean() > weights.mean()
    assert len(set(others)) > 1


def test_arms_leave_the_recorded_run_where_their_weights_begin(small, monkeypatch):
    monkeypatch.setattr(arms_module, "forming", lambda *_: WINDOW)
    found = {name: trained(small, 0, name) for name in ARMS}
    rules, n = small.data.probes.rules, TINY.queries
    for step in (5, 10, 15):
        logits = torch.func.functional_call(
            small.task(0).model, small.run(0).load(step).params, small.data.probes.tokens[n:, :-1]
        )
        expected = divergence(rules["bigram"][n:], logits.double().log_softmax(-1)).mean().item()
        assert found[UNCHANGED]["excess"].sel(step=step).item() == pytest.approx(expected, rel=1e-4)
    late = found.pop("named, after")  # from step 11 on
    xr.testing.assert_allclose(late.sel(step=10), found[UNCHANGED].sel(step=10), rtol=1e-4)
    ends = [one["excess"].sel(step=15).item() for one in (late, *found.values())]
    assert len(set(ends)) == len(ARMS)


def test_induction_has_formed_once_both_measures_have_crossed_their_levels_between_looks():
    def run(excess, attention):
        return xr.Dataset({"excess": ("step", excess), "previous_token": ("step", attention)}, {"step": [0, 10, 30]})

    assert formed(run([0.1, 0.08, 0.04], [0.0, 0.2, 0.6])) == pytest.approx(20)
    assert formed(run([0.1, 0.04, 0.02], [0.0, 0.2, 0.6])) == pytest.approx(15)
    assert np.isnan(formed(run([0.1, 0.08, 0.07], [0.0, 0.2, 0.6])))
    assert np.isnan(formed(run([0.1, 0.04, 0.02], [0.0, 0.1, 0.2])))
