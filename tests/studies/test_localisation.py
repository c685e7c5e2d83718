"""The experiment on the localisation of the posterior, on a small lab."""

import numpy as np
import pytest
from reading import assert_whole, check, plate, value

from stagewise.studies.hierarchy.experiments.localisation import localisation


@pytest.fixture(scope="module")
def localised(coarse):
    return localisation(coarse)


def test_tight_posterior_is_first_order(localised):
    assert value(localised, "sampled BIF vs gradient kernel, gamma = 1000") >= 0.985


def test_odd_part_sees_through_the_curvature_that_hides_flips_at_small_gamma(localised):
    odd, full = value(localised, "gamma = 20, odd part"), value(localised, "gamma = 20: r")
    assert odd >= 0.85
    assert full < odd - 0.2


def test_even_part_has_the_shape_of_the_curvature_floor(localised):
    assert value(localised, "curvature floor") > 0.5


def test_sweep_prefers_large_gamma_and_leaves_out_settings_whose_chains_left(localised):
    least, most = check(localised, "sweep of settings").values
    assert 0.8 < least <= most  # with few draws; a setting whose chains left would be far below
    panels = [np.ma.filled(ax.images[0].get_array(), np.nan) for ax in plate(localised, "sweep").axes if ax.images]
    assert len(panels) == 2
    for panel in panels:  # (gamma, step size)
        assert panel[1, 0] > panel[0, 0]
        assert np.isnan(panel[:, 1]).all()


def test_no_target_is_missed_no_figure_empty_and_no_number_nan(localised):
    assert_whole(localised)
