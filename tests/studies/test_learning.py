"""The experiment on stages of learning, on a small lab."""

import numpy as np
import pytest
from reading import assert_whole, check, value

from stagewise.studies.hierarchy.experiments.learning import learning
from stagewise.studies.hierarchy.lab import correlation, slope


@pytest.fixture(scope="module")
def learnt(lab):
    return learning(lab)


def test_correlation_and_slope_keep_order_and_size_apart_over_all_entries():
    a = np.array([[1.0, -2.0], [3.0, 0.5]])
    assert correlation(a, 4 * a) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)
    assert slope(a, 4 * a) == pytest.approx(4)
    assert slope(a, -a) == pytest.approx(-1)


@pytest.mark.parametrize("start", ["aligned", "random"])
def test_a_mode_that_leaves_its_closed_form_is_seen_from_either_start(learnt, start):
    assert value(learnt, "mode curves", f"{start} start") >= 0.999


def test_modes_are_said_to_rise_at_the_half_rise_times_of_the_closed_form(learnt):
    s = np.sqrt([15, 7, 3, 1])
    rises = check(learnt, "rise half-way")
    np.testing.assert_allclose(rises.values, np.log(s / 1e-4 - 1) / (2 * s), atol=1e-6)
    assert f"at t = {rises.text}, as" in learnt.findings[0]


def test_no_target_is_missed_no_figure_empty_and_no_number_nan(learnt):
    assert_whole(learnt)
