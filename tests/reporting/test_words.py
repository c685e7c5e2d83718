import math

import pytest

from stagewise.reporting import words


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (0.02391, 0.0022, "0.0239 ± 0.0022"),
        (0.0275, 0.0008, "0.0275 ± 0.0008"),
        (-1.5, 0.4, "−1.5 ± 0.4"),
        (123.4, 56, "123 ± 56"),
        (-4.4e-5, 1.2e-5, "(−44 ± 12) × 10⁻⁶"),
        (0.5, 0, "0.5"),
        (0.5, math.nan, "0.5"),
        (math.nan, 0.1, "–"),
        (-0.001, 0.4, "0.0 ± 0.4"),
    ],
)
def test_value_and_doubt_are_cut_at_the_same_digit(value, stderr, expected):
    assert words.plus_minus(value, stderr).replace("\u00a0", " ") == expected


@pytest.mark.parametrize("largest", [0.0099, 0.001, 3e-4, 9e-5, 1.1e-7])
def test_a_unit_makes_numbers_short(largest):
    exponent = words.power_of_ten(largest)
    assert exponent % 3 == 0
    assert 0.1 <= largest / 10.0**exponent < 100


def test_large_numbers_and_zero_need_no_unit():
    assert [words.power_of_ten(x) for x in (0, 0.01, 7, math.inf)] == [0, 0, 0, 0]


def test_singular_and_plural():
    assert words.count(1, "checkpoint") == "1 checkpoint"
    assert words.count(0, "checkpoint") == "0 checkpoints"
    assert words.count(2000, "query", "queries") == "2,000 queries"
    assert words.steps([7]) == "step 7"
    assert words.steps([7, 9, 1000]) == "steps 7, 9 and 1,000"
    assert words.steps(list(range(10, 80, 10))) == "7 steps from 10 to 70"
    assert words.interval(80, 130) == "between steps 80 and 130"
    assert words.interval(80, 80.2) == "at step 80"


def test_steps_on_an_axis_are_short():
    assert [words.short_step(x) for x in (0, 300, 1000, 1500, 30000)] == ["0", "300", "1k", "1,500", "30k"]


def test_scores_have_two_decimals_and_no_negative_zero():
    assert [words.score(x) for x in (1, -0.001, -0.256, math.nan)] == ["1.00", "0.00", "−0.26", "–"]


def test_labels_stay_on_one_line():
    assert words.label_text("a\nb\0") == "a\\nb\\x00"
    assert words.label_text("x" * 40, 24) == "x" * 23 + "…"
