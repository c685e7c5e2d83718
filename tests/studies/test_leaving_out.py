"""The experiment on leaving items out, on a small lab."""

from dataclasses import replace

import numpy as np
import pytest
from reading import assert_whole, check, value

from stagewise.studies.hierarchy.experiments.leaving_out import leaving_out, retrained
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.settings import REDUCED


@pytest.fixture(scope="module")
def left_out(lab):
    return leaving_out(lab)


@pytest.mark.parametrize("run", ["vs retraining, aligned start", "vs retraining, random start: r", "width 256"])
def test_closed_form_of_leaving_items_out_is_what_retraining_measures(left_out, run):
    assert value(left_out, "leave-one-out, closed form", run) > 0.99


def test_losses_without_random_halves_are_in_closed_form_what_retraining_measures(left_out):
    assert value(left_out, "random halves") > 0.999


@pytest.mark.parametrize("start", ["aligned", "random"])
def test_unrolling_is_the_finite_difference_and_not_only_like_it(left_out, start):
    assert value(left_out, "unrolling", start) <= 1e-5
    assert value(left_out, "first-order response, closed form", start) > 0.99


def test_removing_an_item_is_far_from_first_order_and_small_changes_are_not(left_out):
    rs = check(left_out, "finite changes").values
    assert list(rs) == sorted(rs)
    assert rs[0] < 0.9
    assert rs[-1] > 0.99


def test_influence_that_is_measured_has_the_sign_and_unit_of_a_weight(lab):
    """An item helps itself while it is learnt: negative, and per unit weight, whatever the small change."""
    short = Lab(lab.folder, replace(REDUCED, whole_run_steps=range(0, 351, 350)))
    small, smaller = retrained(short, lab.aligned, [0.98, 0.99])
    assert (small[0] == 0).all()
    assert (np.diagonal(small[1]) < 0).all()
    np.testing.assert_allclose(small[1], smaller[1], atol=0.05 * np.abs(small[1]).max())


def test_no_target_is_missed_no_figure_empty_and_no_number_nan(left_out):
    assert_whole(left_out)
