"""The experiment on influence in two times, on a small lab."""

import numpy as np
import pytest
from reading import assert_whole, check, plate, value

from stagewise.studies.hierarchy.experiments.two_times import two_times
from stagewise.studies.hierarchy.settings import RATE


@pytest.fixture(scope="module")
def experiment(lab):
    return two_times(lab)


def test_the_derivative_of_the_run_is_its_closed_form(experiment):
    assert value(experiment, "closed form vs exact derivative") >= 0.999


def test_the_derivative_is_what_small_changes_of_weight_do(experiment):
    assert value(experiment, "largest miss") < 0.01


def test_shares_are_those_of_each_kind(experiment):
    for part in ("left at the end", "before half of the time"):
        assert all(0 < share <= 1 for share in check(experiment, part).values)
        assert len(check(experiment, part).values) == 3


def test_the_figure_has_a_triangle_for_every_kind_up_to_the_last_question(experiment, lab):
    *panels, _ = plate(experiment, "two-times").axes
    assert [ax.get_title(loc="left") for ax in panels] == ["sibling pairs", "cousin pairs", "cross pairs"]
    bins, last = len(lab.settings.two_times_steps) - 1, RATE * lab.settings.two_times_steps[-1]
    for ax in panels:
        drawn = ax.collections[0].get_array().reshape(bins, bins)
        np.testing.assert_array_equal(np.ma.getmaskarray(drawn), ~np.tri(bins, dtype=bool))
        assert ax.get_xlim() == ax.get_ylim() == pytest.approx((0, last))


def test_no_target_is_missed_no_figure_empty_and_no_number_nan(experiment):
    assert_whole(experiment)
