"""The study of a language model on the standard library's source, in miniature: its parts, experiments and page."""

import json
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr
from reading import check, plate, value
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from stagewise.cli import app
from stagewise.dynamics.stages import Transition
from stagewise.influence.trusted import NoTrustedCheckpointError
from stagewise.losses import causal_lm
from stagewise.retraining.window_influence import window_influence
from stagewise.studies import estimators as estimators_module
from stagewise.studies.chance import shuffled_within
from stagewise.studies.effects import effects
from stagewise.studies.labellings import summed
from stagewise.studies.language import cost as cost_module
from stagewise.studies.language import study as study_module
from stagewise.studies.language.classes import CLASSES, FIRST, INDUCTION, token_classes
from stagewise.studies.language.cost import cost
from stagewise.studies.language.experiments import class_influence as class_influence_module
from stagewise.studies.language.experiments.class_influence import ABOUT, class_influence
from stagewise.studies.language.experiments.stages import stages
from stagewise.studies.language.experiments.windows import windows
from stagewise.studies.language.influence import CHANCE, SAME_WORDS, exact, labellings
from stagewise.studies.language.lab import Lab
from stagewise.studies.language.network import logits_and_patterns, loss, network
from stagewise.studies.language.ngrams import PRIOR, NGrams
from stagewise.studies.language.settings import FULL, MINIATURE
from stagewise.studies.language.stages import transitions
from stagewise.studies.language.study import study
from stagewise.studies.language.text import Text
from stagewise.studies.language.training import Data

cli = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("language"), MINIATURE)


@pytest.fixture(scope="module")
def alone(lab):
    """The first run of those, for what takes longer."""
    return Lab(lab.folder, replace(MINIATURE, seeds=1))


# Text and classes


def test_text_is_the_same_each_time_and_every_token_has_its_own_text(lab):
    sizes = (MINIATURE.characters, MINIATURE.vocabulary, MINIATURE.length)
    one, again, other = (Text.of_library(*sizes, seed) for seed in (0, 0, 1))
    assert torch.equal(one.sequences, again.sequences)
    assert one.words == again.words
    assert one.words != other.words or not torch.equal(one.sequences, other.sequences)
    assert len(one.words) == MINIATURE.vocabulary
    assert int(one.sequences.max()) < MINIATURE.vocabulary
    text = "".join(one.words[token] for token in one.sequences.flatten().tolist())
    assert "def " in text
    assert "import" in text


def test_too_little_text_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"expected 900,000,000 characters in the standard library, got \d"):
        Text.of_library(900_000_000, 300, 24, 0)
    with pytest.raises(ValueError, match="expected a vocabulary of 100000 tokens, got"):
        Text.of_library(2000, 100_000, 24, 0)


def labels_of(*texts, reference=()):
    """Of the predicted tokens of a sequence written as its tokens."""
    words = sorted({*texts, *reference})
    tokens, seen = (torch.tensor([[words.index(text) for text in row]]) for row in (texts, reference or texts))
    return token_classes(tokens, words, seen)[0].tolist()


def test_a_rare_pair_is_a_first_occurrence_and_then_an_induction_pattern_whatever_its_words_look_like():
    common = [part for k in range(40) for part in (" cat", f" {chr(97 + k % 26) * (2 + k // 26)}")]
    found = labels_of(" cat", "(", " a", " b", " cat", "(", " cat", "(", reference=common)
    assert found == [FIRST, "word start", "word start", "word start", INDUCTION, "word start", INDUCTION]


def test_a_pair_that_usually_follows_is_neither_a_first_occurrence_nor_an_induction_pattern():
    assert labels_of(" cat", "(", " a", " b", " cat", "(") == [
        "left delimiter", "word start", "word start", "word start", "left delimiter"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("following", "label"),
    [(" x", "keyword"), (":", "keyword"), ("_x", "word start"), ("m", "word start"), ("2", "word start")],
)
def test_a_keyword_is_one_only_if_the_word_ends_with_it(following, label):
    assert labels_of("\n", " for", following)[0] == label


def test_labels_are_of_the_predicted_token_and_one_of_no_kind_has_none():
    assert labels_of("x", ")", "\n    ", "return", " val", "ue", "ten", "=") == [
        "right delimiter", "formatting", "keyword", "word start", "word part", "word end", "formatting"
    ]  # fmt: skip
    assert labels_of("x", ".", "_") == ["", ""]


def test_every_class_is_there_in_training_set_and_queries(lab):
    for labels in (lab.data.classes, lab.data.probes.classes):
        assert set(CLASSES) <= {*labels.ravel().tolist()}
    assert set(ABOUT) == set(CLASSES)


def test_probes_are_not_trained_on(lab):
    together = torch.cat([lab.data.train, lab.data.probes.tokens]).tolist()
    text = Text.of_library(MINIATURE.characters, MINIATURE.vocabulary, MINIATURE.length, MINIATURE.data_seed)
    assert sorted(together) == sorted(text.sequences.tolist())


def test_labels_shuffled_within_words_leave_every_class_its_words_and_move_those_of_context(lab):
    classes, words = lab.data.classes, lab.data.train[:, 1:].numpy()
    mixed = shuffled_within(classes, words, np.random.default_rng(0))
    for name in CLASSES:
        assert sorted(words[classes == name].tolist()) == sorted(words[mixed == name].tolist())
    assert ((mixed == INDUCTION) & (classes != INDUCTION)).any()


# Rules, network and stages


def test_ngrams_are_those_counted_by_hand():
    tokens = torch.tensor([[0, 1, 0, 1], [0, 2, 0, 1]])
    rules = NGrams.of(tokens, 3)
    single = np.array([5, 4, 2]) / 11
    np.testing.assert_allclose(rules.unigram.exp(), single, rtol=1e-6)
    after = np.array([[0, 3, 1], [1, 0, 0], [1, 0, 0]])
    expected = (PRIOR * single + after) / (PRIOR + after.sum(1, keepdims=True))
    np.testing.assert_allclose(rules.bigram.exp(), expected, rtol=1e-5)
    found = rules.log_probabilities(tokens)
    assert torch.equal(found["bigram"][1, 1], rules.bigram[2])
    assert found["unigram"].shape == (2, 3, 3)


def test_the_loss_is_that_which_a_trainer_minimises(lab):
    model, tokens = lab.task(0).model, lab.data.train[:3]
    own = loss(model, tokens)
    torch.testing.assert_close(own, causal_lm(model, tokens)[0])
    torch.testing.assert_close(own.mean(), model(input_ids=tokens, labels=tokens).loss)


def test_attention_of_all_layers_and_heads_is_told_and_sums_to_one():
    model = network(50, 8, 16, 2, 4, seed=0)
    logits, patterns = logits_and_patterns(model, torch.arange(16).view(2, 8))
    assert patterns.shape == (2, 2, 4, 8, 8)
    torch.testing.assert_close(patterns.sum(-1), torch.ones(2, 2, 4, 8))
    assert patterns.triu(1).abs().max() == 0
    assert logits.shape == (2, 8, 50)


def test_initial_weights_are_the_seeds_and_the_callers_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    one, same, other = (network(50, 8, 16, 2, 4, seed).gpt_neox.embed_in.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_stages_are_of_the_checkpoints_own_weights_and_class_losses_add_up(lab):
    found, probes = lab.stages(0), lab.data.probes
    assert found["step"].values.tolist() == [*MINIATURE.steps]
    model = network(MINIATURE.vocabulary, MINIATURE.length, MINIATURE.width, MINIATURE.layers, MINIATURE.heads, 0)
    model.load_state_dict(lab.run(0).load(MINIATURE.last).params, strict=False)
    with torch.no_grad():
        losses = loss(model, probes.tokens).double()
    assert found["loss"][-1].item() == pytest.approx(losses.mean().item(), rel=1e-5)
    for name in CLASSES:
        own = losses[torch.from_numpy(probes.classes == name)].mean().item()
        assert found[f"loss_{name}"][-1].item() == pytest.approx(own, rel=1e-5)
    gap = found[f"loss_{FIRST}"] - found[f"loss_{INDUCTION}"]
    np.testing.assert_allclose(found["repetition"], gap, atol=1e-9)
    assert all("description" in found[name].attrs for name in found)
    assert float(found["loss"][-1]) < float(found["loss"][0]) - 0.5


def test_a_rule_loses_what_it_says_and_the_bigram_rule_less(lab):
    rules, probes = lab.rules, lab.data.probes
    by_hand = -probes.rules.unigram[probes.tokens[:, 1:]].mean().item()
    assert rules["unigram"]["loss"] == pytest.approx(by_hand, rel=1e-5)
    assert rules["bigram"]["loss"] < rules["unigram"]["loss"]


def test_transitions_are_where_measures_turn_and_there_is_none_of_a_measure_that_hardly_rises():
    found = xr.Dataset(
        {
            "kl_unigram": ("step", [3.0, 0.5, 1.0, 2.0]),
            "kl_bigram": ("step", [4.0, 3.0, 0.2, 0.3]),
            "previous_token": ("step", [0.1, 0.1, 0.2, 0.6]),
            "prefix_matching": ("step", [0.0, 0.0, 0.001, 0.005]),
            "in_context": ("step", [0.1, 0.1, 0.1, -0.9]),
            "repetition": ("step", [0.0, 0.0, 0.0, 0.4]),
        },
        {"step": [0, 10, 20, 30]},
    )
    turns = {one.name: one for one in transitions(found)}
    assert list(turns) == ["unigram", "bigram", "previous token", "in context", "repetition"]
    assert [(turns[name].step, turns[name].lower, turns[name].upper) for name in ("unigram", "bigram")] == [
        (10, 0, 20),
        (20, 10, 30),
    ]
    assert turns["previous token"].step == pytest.approx(15)
    assert turns["in context"].detail["half"] == pytest.approx(25)


# Runs


def test_a_run_is_a_trainers_with_warm_up_clipping_decay_and_known_batches(lab):
    run = lab.run(0)
    assert run.steps == MINIATURE.steps
    start = run.load(MINIATURE.steps[1])
    assert start.optimizer.clip_norm == 1
    assert start.coming_batches is not None
    assert all(len(batch) == MINIATURE.batch_size for batch in start.coming_batches)
    rates = [run.load(step).optimizer.learning_rate for step in (4, 22)]
    assert rates[0] == pytest.approx(MINIATURE.rate)
    assert rates[1] < rates[0]


def test_another_run_has_other_weights_and_batches_and_nothing_of_the_callers_is_seeded(lab, tmp_path):
    random.seed(5)
    expected = random.Random(5).random()
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_before = torch.get_rng_state()
    small = Lab(tmp_path, replace(MINIATURE, last=4, checkpoints=2, window_starts=(4,), warm_up=1))
    one, other = (small.run(seed).load(0) for seed in (0, 1))
    assert not all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert not torch.equal(one.coming_batches[0], other.coming_batches[0])
    assert random.random() == expected
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_a_folder_of_another_text_is_refused(lab, monkeypatch):
    lab.run(0)
    monkeypatch.setattr(Data, "digest", property(lambda _: "another"))
    with pytest.raises(ValueError, match="holds runs of other settings"):
        Lab(lab.folder, MINIATURE).run(0)


# Influence


def test_influence_of_each_labelling_is_that_of_its_own_groups(lab):
    step = MINIATURE.window_starts[-1]
    for place, name in ((0, "classes"), (1, CHANCE), (2, SAME_WORDS)):
        own = window_influence(
            lab.task(0), lab.run(0), window=MINIATURE.window, steps=[step], groups=labellings(lab, 0)[place]
        )
        found = exact(lab, 0, name).sel(step=[step], train=own["train"])
        np.testing.assert_allclose(found["value"], own["value"], rtol=1e-3, atol=1e-3 * abs(own["value"]).max().item())
        np.testing.assert_array_equal(found["train_size"], own["train_size"])
        assert (found["stderr"] == 0).all()


def test_errors_that_are_not_known_stay_unknown_when_groups_are_summed():
    coords = {"step": [0], "train": ["a/x", "b/x", "/y"], "query": ["q"], "train_size": ("train", [1, 3, 5])}
    value = np.array([1.0, 2.0, 7.0]).reshape(1, 3, 1)
    joint = xr.Dataset(
        {name: (("step", "train", "query"), v) for name, v in {"value": value, "stderr": value * np.nan}.items()},
        coords,
    )
    first, second = summed(joint, 0), summed(joint, 1)
    assert first["train"].values.tolist() == ["a", "b"]
    assert second.sel(train="x")["value"].item() == pytest.approx((1 + 6) / 4)
    assert second.sel(train="x")["train_size"].item() == 4
    assert second["stderr"].isnull().all()


# Experiments


def test_stages_are_told_with_the_rules_beside_them(lab):
    found = stages(lab)
    assert len(check(found, "loss at the end").values) == MINIATURE.seeds
    assert len(check(found, "unigram").values) == MINIATURE.seeds
    assert "nearest to the unigram rule" in found.findings[0]
    assert len(plate(found, "stages").axes) == 4
    _, table = found.section.parts
    assert [row[0] for row in table.rows] == list(CLASSES)


def test_exact_influence_of_pairs_of_different_classes_reaches_its_targets_and_gradients_do_not_do_as_well(alone):
    found = windows(alone)
    held = [one for one in found.checks if one.reached is not None]
    assert len(held) == 3
    assert all(one.reached for one in held)
    assert value(found, "exact", "least r") > value(found, "products", "least r")
    _, table, sampled = found.section.parts
    answered = [row for row in table.rows if row[2] == "damped" and row[3] != "–"]
    assert [row[0] for row in answered] == [str(step) for step in MINIATURE.solved]
    assert [row[:2] for row in sampled.rows] == [[str(MINIATURE.sampled[0]), "ok"]]
    assert -1 <= float(sampled.rows[0][2].replace("−", "-")) <= 1


def test_effects_are_paired_by_label_and_hold_only_pairs_of_different_classes(alone):
    def backwards(lab, seed):
        influence = exact(lab, seed)
        return influence.isel(train=slice(None, None, -1), step=[-1]).transpose("query", "train", "step")

    one, other = (effects(alone, estimator, 0.95, apart=True) for estimator in (exact, backwards))
    assert one.measured.dims == other.predicted.dims == ("seed", "step", "train", "query")
    xr.testing.assert_identical(other.predicted.sel(step=[22]).drop_attrs(), one.predicted.sel(step=[22]).drop_attrs())
    assert other.predicted.sel(step=4).isnull().all()
    assert other.scores["correlation"].sel(step=22).item() == pytest.approx(
        one.scores["correlation"].sel(step=22).item()
    )
    assert other.scores["correlation"].sel(step=4).isnull()
    for part in (one.measured, one.predicted):
        assert int(part.isnull().sum()) == len(MINIATURE.window_starts) * len(CLASSES)


def test_chains_that_cannot_be_trusted_are_told_with_their_verdict_and_without_numbers(alone, monkeypatch):
    untrusted = xr.Dataset({"verdict": ("step", ["not localised"]), "advice": ("step", ["shorter"])}, {"step": [22]})

    def refuse(_):
        raise NoTrustedCheckpointError("none")

    monkeypatch.setattr(estimators_module, "sample", lambda *_, **__: None)
    monkeypatch.setattr(estimators_module, "diagnose_run", lambda _: untrusted)
    monkeypatch.setattr(estimators_module, "bif", refuse)
    found = estimators_module._chains(alone, 0, apart=True)
    assert found["verdict"].item() == "not localised"
    assert found["correlation"].isnull().all()


def test_influence_on_itself_is_told_beside_both_controls_and_its_stage(lab):
    found = class_influence(lab)
    assert len(plate(found, "influence-on-itself").axes) == len(CLASSES)
    table = found.section.parts[-1]
    assert [row[0] for row in table.rows] == list(CLASSES)
    peaks = []
    for seed in lab.seeds:
        curve = exact(lab, seed).sel(train="formatting", query="formatting")["value"]
        assert curve.min() < 0
        peaks.append(float(curve["step"][int(curve.argmin("step"))]) + MINIATURE.window / 2)
    told = check(found, "formatting tokens")
    assert (told.lower[0], told.upper[0]) == (min(peaks), max(peaks))
    row = table.rows[CLASSES.index("formatting")]
    assert row[1] == told.text
    assert row[3].startswith("−")
    for what in ("distance of all peaks", "share of other times"):
        assert len(check(found, what).values) == MINIATURE.seeds
    assert found.claims


def test_peaks_are_held_against_the_stage_they_were_said_to_belong_to(lab):
    """Of a class that is about a stage which a run does not have, nothing is asked."""
    run = class_influence_module._Run.of(lab, 0)
    own = [
        Transition(name, "minimum", step, step - 1, step + 1, {}) for name, step in (("unigram", 5.0), ("bigram", 20.0))
    ]
    aligned = class_influence_module._aligned(replace(run, transitions=own), MINIATURE.last)
    about = dict(zip(aligned["train"].values.tolist(), aligned["transition"].values.tolist(), strict=True))
    assert about == {name: stage for name, stage in ABOUT.items() if stage != "repetition" and name in about}
    assert set(about.values()) == {"unigram", "bigram"}
    assert class_influence_module._aligned(replace(run, transitions=[]), MINIATURE.last) is None


# The study


@pytest.mark.usefixtures("no_pictures_here")
def test_a_study_goes_on_from_the_runs_and_results_that_its_folder_holds(alone, monkeypatch):
    for experiment in (stages, windows, class_influence):
        experiment(alone)

    def refuse(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr("stagewise.studies.language.lab.record", refuse)
    parts = study(alone.folder, settings=alone.settings)
    said = json.loads((alone.folder / "checks.json").read_text(encoding="utf-8"))
    assert len(said) == sum(len(part.checks) for part in parts)
    page = " ".join((alone.folder / "report.html").read_text(encoding="utf-8").split())
    for text in ("What is learnt, and when", "Held against retraining", "Which tokens teach it", "one training token"):
        assert text in page
    assert not [text for part in parts for text in part.findings if "nan" in text]


@pytest.mark.usefixtures("no_pictures_here")
def test_command_carries_out_one_experiment_and_predicts_the_cost_without_writing(tmp_path, monkeypatch):
    short = replace(MINIATURE, seeds=1, last=8, checkpoints=2, window_starts=(4,), solved=(), sampled=())
    monkeypatch.setattr(study_module, "study", partial(study, settings=short))
    monkeypatch.setattr(cost_module, "cost", partial(cost, short))
    predicted = cli.invoke(app, ["study", "language", "--out", str(tmp_path), "--dry-run"])
    assert predicted.exit_code == 0, predicted.output
    for text in ("time ", "training 1 run", "exact influence of", "products of gradients", "damped"):
        assert text in predicted.output
    assert not list(tmp_path.iterdir())
    result = cli.invoke(app, ["study", "language", "--out", str(tmp_path), "--only", "stages"])
    assert result.exit_code == 0, result.output
    assert "nearest to the unigram rule" in result.output
    assert (tmp_path / "language" / "stages" / "report.html").exists()
    assert not (tmp_path / "language" / "report.html").exists()  # the place of the whole study's


def test_miniature_study_is_the_full_one_with_less_of_everything_but_the_rate():
    for name, full in vars(FULL).items():
        sizes = [size if isinstance(size, int | float) else len(size) for size in (getattr(MINIATURE, name), full)]
        assert sizes[0] <= sizes[1] or name == "rate"
    for settings in (FULL, MINIATURE):
        assert {*settings.window_starts, *settings.solved, *settings.sampled} <= {*settings.exact_starts}
        assert all(a < b for a, b in pairwise(settings.steps))
    assert len(FULL.steps) >= 20
    assert len(FULL.window_starts) >= 6
    assert FULL.window_starts[0] == 10
    assert FULL.seeds >= 3
