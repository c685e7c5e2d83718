"""Scalars as YAML 1.2 has them, both ways."""

import math

import pytest
import yaml

from stagewise.run.yaml12 import dump, load


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        ("-2.5e+1", -25.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.INF", -math.inf),
        ("12", 12),
        ("+5", 5),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("Null", None),
    ],
)
def test_numbers_truths_and_nothing_are_read_as_such(text, value):
    read = load(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


TEXTS = [
    "on",
    "Off",
    "yes",
    "NO",
    "y",
    "n",
    "1:30",
    "12:30:45",
    "2024-01-31",
    "2024-01-31 10:00:00",
    "1_000",
    "0b1",
    "=",
]


@pytest.mark.parametrize("text", TEXTS)
def test_words_times_and_dates_are_text(text):
    assert load(f"[{text}]") == [text]
    assert load(f"{text}: 1") == {text: 1}


@pytest.mark.parametrize(
    "text", [*TEXTS, "1e-3", "0o17", "0x1F", "017", "~", "", "null", "true", ".nan", "<<", "5\n", "é"]
)
def test_text_that_looks_like_something_else_comes_back_as_text(text):
    assert load(dump({"key": [text], text: 1})) == {"key": [text], text: 1}


@pytest.mark.parametrize("value", [1e-5, 1e300, 3.0, math.inf, -7, 0, True, None, [], {}, {"a": {"b": [1, 2.5]}}])
def test_values_come_back_with_their_type(value):
    back = load(dump([value]))[0]
    assert back == value
    assert type(back) is type(value)


def test_not_a_number_comes_back():
    assert math.isnan(load(dump(math.nan)))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "s: {a: 1, a: 1}", "- {a: 1, 'a': 1}"])
def test_a_key_that_stands_twice_is_refused_instead_of_the_first_being_lost(text):
    with pytest.raises(yaml.YAMLError, match=r"'a' stands twice(?s:.*)line"):
        load(text)


def test_a_merged_mapping_may_be_overridden():
    assert load("base: &b {x: 1, y: 1}\nown: {<<: *b, y: 2}")["own"] == {"x": 1, "y": 2}
