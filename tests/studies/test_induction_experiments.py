"""The experiments of the study of in-context Markov chains, and its page, on runs of seconds that learn induction."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import zarr
from reading import assert_whole, check, plate, value
from typer.testing import CliRunner

from stagewise.cli import app
from stagewise.explorer.page import write_explorer
from stagewise.influence.bif import bif
from stagewise.influence.llc import llc
from stagewise.influence.trusted import NoTrustedCheckpointError
from stagewise.studies.effects import of_classes
from stagewise.studies.induction import cost as cost_module
from stagewise.studies.induction import lab as lab_module
from stagewise.studies.induction import study as study_module
from stagewise.studies.induction.arms import ARMS, CHANCE, NAMED, UNCHANGED, formed, trained
from stagewise.studies.induction.cost import cost
from stagewise.studies.induction.experiments import observables as observables_module
from stagewise.studies.induction.experiments import windows as windows_module
from stagewise.studies.induction.experiments.class_influence import class_influence
from stagewise.studies.induction.experiments.intervention import intervention
from stagewise.studies.induction.experiments.observables import observables
from stagewise.studies.induction.experiments.stages import stages
from stagewise.studies.induction.experiments.two_times import in_time, two_times
from stagewise.studies.induction.experiments.windows import windows
from stagewise.studies.induction.influence import exact
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.observed import excess, influence, spectrum, traces
from stagewise.studies.induction.settings import EIGHT, FULL, OBSERVED_SEQUENCES, REDUCED
from stagewise.studies.induction.study import study
from stagewise.studies.induction.training import EXCESS
from stagewise.studies.measures import divergence
from stagewise.studies.seeds import t_interval

cli = CliRunner()
PLATEAU = replace(
    REDUCED,
    seeds=1,
    sequences=96,
    last=4,
    every=2,
    window_starts=(1, 2),
    part=32,
    solved=(2,),
    sampled=(2,),
    until=4,
    choose_every=2,
    look_every=2,
)
"""Ends long before anything is learnt, and one seed has no interval."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("induction"), REDUCED)


def test_every_seed_counts_first_and_then_learns_induction(lab):
    found = stages(lab)
    assert_whole(found)
    counting, onset, half = (check(found, name).values for name in ("unigram rule, each", "onset", "half"))
    assert all(a < b < c for a, b, c in zip(counting, onset, half, strict=True))
    assert len(plate(found, "stages").axes) == 2


def test_exact_influence_reaches_its_targets_and_products_of_gradients_do_not_do_as_well(lab):
    found = windows(lab)
    assert_whole(found)
    assert value(found, "exact", "least r") > value(found, "products", "least r")
    _, table, sampled = found.section.parts
    assert len(table.rows) == 3 * len(REDUCED.window_starts)
    answered = [row[0] for row in table.rows if row[2] == "damped" and row[3] != "–"]
    assert answered == [str(step) for step in REDUCED.solved]
    assert [row[0] for row in sampled.rows] == [str(step) for step in REDUCED.sampled]
    assert sampled.title.endswith("of these on theirs")  # all pairs, as everywhere else on this page
    assert sampled.rows[0][1] in found.findings[1]


def test_exact_influence_is_held_where_windows_begin_and_needs_no_other_window(lab, monkeypatch):
    monkeypatch.setattr(windows_module, "held", lambda lab, exact, *_, **__: exact(lab, 0))
    assert windows(lab)["step"].values.tolist() == list(REDUCED.window_starts)


def test_influence_of_classes_is_told_with_peaks_flips_and_the_control(lab):
    found = class_influence(lab)
    said = {c.what: c for c in found.checks}
    assert said["seeds whose peak of induction → excess lies within the transition"].target == (REDUCED.seeds,)
    assert said["once networks count, seeds whose peak of induction → excess lies within the transition"].target == ()
    own, chance = (said[what].values for what in (
        "the peak in nats per unit weight of all induction tokens, each seed",
        "as many tokens drawn by chance in that window, each seed",
    ))  # fmt: skip
    assert all(peak < 0 for peak in own)
    assert own != chance
    after = said["once networks count, middle of the window of that peak, each seed"].values
    assert all(when > check(stages(lab), "unigram rule, each").values[seed] for seed, when in enumerate(after))
    flips = said["sign flips of induction → excess, each seed"].text
    assert len(said["sign flips of as many tokens drawn by chance → excess, each seed"].values) == REDUCED.seeds
    row = next(row for row in found.section.parts[-1].rows if row[:2] == ["induction", "excess"])
    assert ", ".join(cell.split()[0] for cell in row[2:]) == flips
    assert len(plate(found, "influence-on-excess").axes) == REDUCED.seeds
    assert len(plate(found, "influence-on-classes").axes) == 4


def test_observables_of_the_local_posterior_are_those_of_the_draws_and_held_to_what_was_said(lab, monkeypatch):
    monkeypatch.setattr(observables_module, "OBSERVED_RUNS", 1)
    found, store = observables(lab), traces(lab, 0)
    when, steps = lab.transition(0), list(REDUCED.observed)
    ends = [min(steps, key=lambda step: abs(step - end)) for end in (when.lower, when.upper)]
    before, after = (llc(store, part="even").sel(step=step)["value"].item() for step in ends)
    rise = check(found, "rise of the local learning coefficient")
    assert rise.value == pytest.approx(after - before)
    assert rise.lower[0] < rise.value < rise.upper[0]
    assert value(found, "seeds whose local") == (rise.lower[0] > 0)
    for name, curve in (("share of the top", spectrum(store)["value"]), ("influence of", -influence(store)["value"])):
        largest = curve["step"][int(curve.argmax("step"))].item()
        assert value(found, f"the {name}", "step, each") == largest
        assert value(found, f"seeds whose {name}") == (when.lower <= largest <= when.upper and curve.max() > 0)
        assert check(found, f"seeds whose {name}").target == (1,)
    assert check(found, "can be trusted").values == (llc(store).sizes["step"], len(steps))
    assert 0 < value(found, "spread of the excess") < 1
    assert len(plate(found, "observables").axes) == 4


def test_influence_of_all_induction_tokens_is_the_sum_over_thirds_and_the_excess_that_of_the_checkpoint(lab):
    store, whole = traces(lab, 0), influence(traces(lab, 0))["value"]
    each = of_classes(bif(store)).sel(query=EXCESS)
    thirds = [name for name in each["train"].values if name.startswith("induction ")]
    np.testing.assert_allclose(whole, each.sel(train=thirds).sum("train"), rtol=1e-6)
    model, data, step = lab.task(0).model, lab.data, REDUCED.observed[-1]
    logits = torch.func.functional_call(model, lab.run(0).load(step).params, data.queries[:OBSERVED_SEQUENCES, :-1])
    rule = data.probes.rules["bigram"][:OBSERVED_SEQUENCES]
    expected = divergence(rule, logits.double().log_softmax(-1)).mean().item()
    assert excess(store, [step])["anchor"].item() == pytest.approx(expected, rel=1e-4)


def test_chains_that_can_be_trusted_nowhere_are_told_and_end_no_study(lab, monkeypatch):
    def refuse(*_, **__):
        raise NoTrustedCheckpointError("none")

    monkeypatch.setattr(observables_module, "OBSERVED_RUNS", 1)
    monkeypatch.setattr(observables_module, "llc", refuse)
    found = observables(lab)
    assert "at no checkpoint of 1 run" in found.findings[0]
    assert not found.checks


def test_influence_in_two_times_is_what_the_change_does_that_is_made_and_nothing_after_the_question(lab):
    found = two_times(lab)
    assert check(found, "vs that change made, all seeds and steps: r").value > 0.97
    assert 0.9 < check(found, "vs that change made, all seeds and steps: slope").value < 1.1
    first, last = lab.settings.asked
    run = in_time(lab, 0).sel(asked=first)
    assert (run.sel(trained=slice(0, first - 1)) != 0).all()
    assert (run.sel(trained=slice(first, last)) == 0).all()


def test_first_run_can_be_looked_around_in_with_what_the_experiments_keep(lab, tmp_path):
    results = study_module.explored(lab)
    assert set(results.agreements) == {"exact influence", "damped influence", "gradient product"}
    assert results.events, "flips and peaks of exact influence are told"
    write_explorer(results, tmp_path)
    data = zarr.open_group(tmp_path / "explorer" / "data.zarr", mode="r")
    exact_of_first = exact(lab, 0)["value"].transpose("step", "train", "query").values
    np.testing.assert_allclose(data["influence/0/value"][...], exact_of_first, rtol=1e-6)
    assert data.attrs["two_times"]["trained_stop"][-1] == lab.settings.bins[-1]
    assert "induction" in [stage["name"] for stage in data.attrs["stages"]]


def test_a_t_interval_is_that_of_the_tables_and_one_seed_has_none():
    mean, lower, upper = t_interval([1.0, 2.0, 3.0])
    assert (mean, upper - mean) == pytest.approx((2, 4.302653 / 3**0.5))
    assert mean - lower == pytest.approx(upper - mean)
    assert np.isnan(t_interval([1.0])[1:]).all()
    assert np.isnan(t_interval([1.0, np.nan])[0])


def test_every_arm_is_told_with_intervals_beside_the_unchanged_run_and_beside_chance(lab):
    found = intervention(lab)
    when = {arm: np.array([formed(trained(lab, seed, arm)) for seed in lab.seeds]) for arm in ARMS}
    _, table = found.section.parts
    assert [row[0] for row in table.rows] == [arm for arm in ARMS if arm != UNCHANGED]
    for arm, *_, gained, beyond, _ in table.rows:
        told = check(found, f"{arm}: ", "than unchanged" if arm == CHANCE else "earlier than unchanged")
        mean, lower, upper = t_interval(when[UNCHANGED] - when[arm])
        assert (told.value, told.lower[0], told.upper[0]) == pytest.approx((mean, lower, upper))
        assert gained == told.text
        if arm != CHANCE:
            assert check(found, f"{arm}: ", "than chance").value == pytest.approx((when[CHANCE] - when[arm]).mean())
        assert any(sentence.startswith(f"{arm}: {gained}") for sentence in found.findings)
        assert beyond or arm == CHANCE
    end = check(found, f"{NAMED}: ", "excess at the end").value
    excess = [[trained(lab, seed, arm)["excess"].values[-1] for seed in lab.seeds] for arm in (NAMED, UNCHANGED)]
    assert end == pytest.approx(1e3 * np.subtract(*excess).mean())
    assert len(plate(found, "intervention").axes) == 2


@pytest.mark.usefixtures("no_pictures_here")
def test_a_study_that_ends_on_the_plateau_is_told_without_numbers_that_are_not_there(tmp_path):
    parts = study(tmp_path, settings=PLATEAU)
    assert "None of 1 run learns induction in 4 steps." in parts[0].findings
    checks = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))
    assert {c["what"]: c["reached"] for c in checks}["seeds that learn induction"] is False
    assert not [text for part in parts for text in part.findings if "nan" in text]
    page = " ".join((tmp_path / "report.html").read_text(encoding="utf-8").split())
    for text in ("What is learnt, and when", "Held against retraining", "nothing to bring", "one training token"):
        assert text in page


@pytest.mark.usefixtures("no_pictures_here")
def test_a_study_goes_on_from_the_runs_and_results_that_its_folder_holds(tmp_path, monkeypatch):
    first = study(tmp_path, settings=PLATEAU)

    def refuse(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(lab_module, "record", refuse)
    again = study(tmp_path, settings=PLATEAU)
    assert [check.as_plain() for part in again for check in part.checks] == [
        check.as_plain() for part in first for check in part.checks
    ]


@pytest.mark.usefixtures("no_pictures_here")
def test_command_carries_out_the_study_and_predicts_its_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "study", partial(study, settings=PLATEAU, experiments=(stages,)))
    monkeypatch.setattr(cost_module, "cost", partial(cost, PLATEAU))
    predicted = cli.invoke(app, ["study", "induction", "--out", str(tmp_path), "--dry-run"])
    assert predicted.exit_code == 0, predicted.output
    for text in (
        "time ",
        "training 1 run",
        "exact influence of",
        "the local posterior of 1 run at 2 checkpoints",
        "damped",
        "with other weights, in 9 ways",
    ):
        assert text in predicted.output
    assert not list(tmp_path.iterdir())
    result = cli.invoke(app, ["study", "induction", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "None of 1 run" in result.output
    assert (tmp_path / "induction" / "report.html").exists()


@pytest.mark.usefixtures("no_pictures_here")
def test_command_carries_out_one_experiment_alone_and_names_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "study", partial(study, settings=PLATEAU))
    result = cli.invoke(app, ["study", "induction", "--out", str(tmp_path), "--only", "intervention"])
    assert result.exit_code == 0, result.output
    assert "nothing to bring forward" in result.output
    assert "None of 1 run" not in result.output
    for name, message in (("induction", "there are: stages, class_influence,"), ("digits", "carried out whole")):
        refused = cli.invoke(app, ["study", name, "--out", str(tmp_path), "--only", "nobody"])
        assert refused.exit_code == 1
        assert message in " ".join(refused.output.split())
    assert (tmp_path / "induction" / "intervention" / "report.html").exists()


def test_reduced_study_is_the_full_one_with_less_of_everything_but_the_rate():
    for name, full in vars(FULL).items():
        sizes = [value if isinstance(value, int | float) else len(value) for value in (getattr(REDUCED, name), full)]
        assert sizes[0] <= sizes[1] or name == "rate"
    assert len(FULL.window_starts) >= 6
    assert FULL.window_starts[0] >= 10


@pytest.mark.parametrize("settings", [FULL, EIGHT, REDUCED, PLATEAU])
def test_windows_begin_at_checkpoints_from_which_there_are_batches_to_their_end(settings):
    assert {*settings.window_starts} <= {*settings.exact_starts}
    assert {*settings.solved, *settings.sampled} <= {*settings.window_starts}


def test_what_is_only_asked_of_runs_leaves_folders_of_them_usable():
    assert list(FULL.of_a_run()) == [
        "vocabulary", "length", "sequences", "probes", "data_seed", "width", "heads", "batch_size", "rate", "last",
        "every",
    ]  # fmt: skip
