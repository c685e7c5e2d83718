"""Attributions as JSON lines: what is written is what is read, whatever the texts of the data are."""

import json

import pytest
from typer.testing import CliRunner

import stagewise as sw
from stagewise.cli import app
from stagewise.results import Exemplar
from stagewise.run.attribution import Attribution
from stagewise.run.folder import save_results
from stagewise.traces.store import TraceStore

HOSTILE = ["</script><script>alert(1)</script>", 'say "no"\n{"a": 1}\r\n', "é 😀 \u202e\u2028", "\ud800", "\\u003c", ""]


def exemplar(**changes):
    made = {
        "query": "val:x",
        "step": 7,
        "samples": [3, 1, 5, 2, 3],
        "labels": ["three", "one", "five", "two", "three"],
        "values": [-1.5, 0.1 + 0.2, 0.0, -2e-30, -1.5],
        "stderrs": [0.5, 0.25, 0.0, 1e-31, 0.5],
    }
    return Exemplar(**made | changes)


@pytest.fixture
def folder(tmp_path):
    def made(*exemplars, window=30):
        root = tmp_path / "run"
        TraceStore.open(root, {"task": "this"})
        (root / "config.yaml").write_text(json.dumps({"posterior": {"window": window}}))
        save_results(root, {}, exemplars)
        return root

    return made


def test_what_is_written_is_read_back_with_helpful_samples_as_proponents_of_positive_score(folder, tmp_path):
    path = tmp_path / "attributions.jsonl"
    assert sw.write_jsonl(folder(exemplar(), exemplar(step=9)), path) == 2
    first, second = sw.read_jsonl(path)
    assert first == {
        "example_id": "val:x at step 7",
        "inputs_plaintext": "val:x",
        "targets_plaintext": "(step 7)",
        "step": 7,
        "window": 30,
        "score": "minus influence, nats per unit weight",
        "proponents": ["three", "two"],  # each once, though 3 was listed twice
        "proponent_ids": ["3", "2"],
        "proponent_scores": [1.5, 2e-30],
        "proponent_stderrs": [0.5, 1e-31],
        "opponents": ["one"],
        "opponent_ids": ["1"],
        "opponent_scores": [-(0.1 + 0.2)],
        "opponent_stderrs": [0.25],
    }
    assert second["step"] == 9
    assert path.read_text().count("\n") == 2


def test_texts_of_tokens_are_the_passages_and_a_sample_without_any_text_has_its_number(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [["a", " b"], ["c"], ["d"], ["e", "f"], ["a", " b"]]
    sw.write_jsonl(folder(exemplar(texts=texts), exemplar(labels=[""] * 5), window=None), path)
    spelled, numbered = sw.read_jsonl(path)
    assert (spelled["proponents"], spelled["opponents"]) == (["a b", "ef"], ["c"])
    assert (numbered["proponents"], numbered["opponents"]) == (["sample 3", "sample 2"], ["sample 1"])
    assert spelled["window"] is None


def test_hostile_texts_are_nothing_but_text(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    names = [*HOSTILE[:5], HOSTILE[0]]
    one = exemplar(
        query=HOSTILE[0], samples=[0, 1, 2, 3, 4, 5], labels=names, values=[-6.0, -5, -4, -3, -2, 1], stderrs=[0.0] * 6
    )
    assert sw.write_jsonl(folder(one), path) == 1
    content = path.read_bytes()
    assert content.isascii()
    assert content.count(b"\n") == 1
    assert b"<" not in content
    (record,) = sw.read_jsonl(path)
    assert record["proponents"] == HOSTILE[:5]
    assert record["inputs_plaintext"] == HOSTILE[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["values", "stderrs"])
def test_numbers_that_are_not_finite_are_not_written_and_the_file_stays_as_it_was(folder, tmp_path, field, bad):
    path = tmp_path / "a.jsonl"
    path.write_text("before")
    with pytest.raises(ValueError, match="val:x at step 9: the influence of a sample is not finite"):
        sw.write_jsonl(folder(exemplar(), exemplar(step=9, **{field: [1.0, 2.0, 3.0, 4.0, bad]})), path)
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "run"]


def test_a_run_without_single_samples_says_how_to_get_them(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no single training samples; run it with the setting exemplars=6"):
        sw.write_jsonl(folder(), tmp_path / "a.jsonl")


def test_files_of_others_are_read_with_the_fields_they_have(tmp_path):
    path = tmp_path / "trex.jsonl"
    known = {"example_id": "e", "inputs_plaintext": "in", "targets_plaintext": "out", "proponents": ["p"]}
    path.write_text(json.dumps(known | {"proponent_ids": ["c4-1"], "fact_id": 3}) + "\n\n" + json.dumps(known))
    assert [record.get("fact_id") for record in sw.read_jsonl(path)] == [3, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_plaintext": 3}, r"line 2: inputs_plaintext: Input should be a valid string \(got 3\)"),
        ({"example_id": None}, "line 2: example_id: Input should be a valid string"),
        ({"proponents": "p"}, "line 2: proponents: Input should be a valid list"),
        ({"proponent_scores": [1.0, 2.0]}, "line 2: .* different lengths: .*'proponents': 1, 'proponent_scores': 2"),
        ({"proponent_scores": ["1"]}, "line 2: proponent_scores.0: Input should be a valid number"),
        ({"proponent_scores": [True]}, "line 2: proponent_scores.0: Input should be a valid number"),
        ({"proponent_scores": [float("nan")]}, "line 2: NaN is no number"),
        ({"opponent_scores": [1], "opponents": []}, "line 2: .* different lengths: .*'opponent_scores': 1"),
    ],
)
def test_lines_that_are_no_attributions_are_refused_with_their_number(tmp_path, change, message):
    path = tmp_path / "a.jsonl"
    known = {"example_id": "e", "inputs_plaintext": "in", "targets_plaintext": "out", "proponents": ["p"]}
    path.write_text(json.dumps(known) + "\n" + json.dumps(known | change))
    with pytest.raises(ValueError, match=message):
        sw.read_jsonl(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 1: Input should be a valid dictionary"),
        ("{", "line 1: Expecting"),
        (
            '{"example_id": "e", "inputs_plaintext": "i", "targets_plaintext": "t"}',
            "line 1: proponents: Field required",
        ),
        (
            '{"example_id":"e","inputs_plaintext":"i","targets_plaintext":"t","proponents":[],"opponent_scores":[1e999]}',
            "line 1: opponent_scores.0: Input should be a finite number",
        ),
    ],
)
def test_what_is_no_record_at_all_is_refused(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        sw.read_jsonl(path)


def test_schema_of_a_line_accepts_what_is_exported_and_names_every_field_of_it(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    sw.write_jsonl(folder(exemplar()), path)
    (record,) = sw.read_jsonl(path)
    assert set(record) <= set(Attribution.model_json_schema()["properties"])


def test_validate_names_the_line_that_is_wrong_and_ends_with_code_1(tmp_path):
    path = tmp_path / "a.jsonl"
    good = {"example_id": "e", "inputs_plaintext": "in", "targets_plaintext": "out", "proponents": ["p"]}
    path.write_text(json.dumps(good) + "\n")
    assert CliRunner().invoke(app, ["validate", str(path)]).exit_code == 0
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"proponents": [1]}) + "\n")
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 1
    assert "line 2: proponents.0: Input should be a valid string" in result.output
