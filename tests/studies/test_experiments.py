"""Every experiment of the hierarchy study on one small lab, held to what a reader relies on."""

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from stagewise.reporting.page import Plate
from stagewise.reporting.tables import Table
from stagewise.studies.hierarchy.experiments.learning import learning
from stagewise.studies.hierarchy.experiments.leaving_out import leaving_out, retrained
from stagewise.studies.hierarchy.experiments.localisation import localisation
from stagewise.studies.hierarchy.experiments.symmetry import symmetry
from stagewise.studies.hierarchy.experiments.transitions import transitions
from stagewise.studies.hierarchy.experiments.windows import gradient_products, window_kernel, windows
from stagewise.studies.hierarchy.lab import Lab, correlation, slope
from stagewise.studies.hierarchy.settings import RATE, REDUCED, WINDOW
from stagewise.studies.hierarchy.theory.tree import KINDS

FLIPS = {"cross": 1.28, "cousin": 1.56, "sibling": 2.41}
"""When the residuals of two items part, by the closed form from a0 = 1e-4."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), REDUCED)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """With fewer checkpoints, for what looks at each of them and not at the times between."""
    return Lab(tmp_path_factory.mktemp("coarse"), replace(REDUCED, checkpoints=8))


@pytest.fixture(scope="module")
def learnt(lab):
    return learning(lab)


@pytest.fixture(scope="module")
def left_out(lab):
    return leaving_out(lab)


@pytest.fixture(scope="module")
def in_windows(coarse):
    return windows(coarse)


@pytest.fixture(scope="module")
def turned(lab):
    return transitions(lab)


@pytest.fixture(scope="module")
def localised(coarse):
    return localisation(coarse)


@pytest.fixture(scope="module")
def symmetric(lab):
    return symmetry(lab)


def check(experiment, *parts):
    (found,) = [c for c in experiment.checks if all(part in c.what for part in parts)]
    return found


def value(experiment, *parts):
    return check(experiment, *parts).value


def plate(experiment, name) -> Figure:
    (found,) = [p for p in experiment.section.parts if isinstance(p, Plate) and p.name == name]
    return found.figure


@pytest.mark.parametrize("name", ["learnt", "left_out", "in_windows", "turned", "localised", "symmetric"])
def test_no_target_is_missed_no_figure_empty_and_no_number_nan(request, name):
    experiment = request.getfixturevalue(name)
    assert not [c for c in experiment.checks if c.reached is False]
    assert [c for c in experiment.checks if c.reached]
    for part in experiment.section.parts:
        assert part.rows if isinstance(part, Table) else part.figure.axes
    assert np.isfinite([v for c in experiment.checks for v in (*c.values, *c.lower, *c.upper, *c.target)]).all()
    texts = [*experiment.findings, *(c.found for c in experiment.claims)]
    assert not [text for text in texts if re.search(r"\b(nan|inf|None)\b", text)]


def test_correlation_and_slope_keep_order_and_size_apart_over_all_entries():
    a = np.array([[1.0, -2.0], [3.0, 0.5]])
    assert correlation(a, 4 * a) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)
    assert slope(a, 4 * a) == pytest.approx(4)
    assert slope(a, -a) == pytest.approx(-1)


def test_matrices_have_the_order_of_the_items_and_of_train_and_query_whatever_the_datasets_order(lab):
    shuffled = lab.measured_windows.sortby("train", ascending=False).sortby("query").transpose("query", "train", "step")
    got = lab.matrix(shuffled)
    dog, rose = (lab.items.names.index(name) for name in ("dog", "rose"))
    np.testing.assert_array_equal(got[:, dog, rose], lab.measured_windows["value"].sel(train="dog", query="rose"))
    np.testing.assert_array_equal(got[:, rose, dog], lab.measured_windows["value"].sel(train="rose", query="dog"))
    assert (got[:, dog, rose] != got[:, rose, dog]).any()


@pytest.mark.parametrize("start", ["aligned", "random"])
def test_a_mode_that_leaves_its_closed_form_is_seen_from_either_start(learnt, start):
    assert value(learnt, "mode curves", f"{start} start") >= 0.999


def test_modes_are_said_to_rise_at_the_half_rise_times_of_the_closed_form(learnt):
    s = np.sqrt([15, 7, 3, 1])
    rises = check(learnt, "rise half-way")
    np.testing.assert_allclose(rises.values, np.log(s / 1e-4 - 1) / (2 * s), atol=1e-6)
    assert f"at t = {rises.text}, as" in learnt.findings[0]


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


def test_window_ablation_is_the_gradient_kernel_at_the_windows_centre(in_windows):
    assert value(in_windows, "gradient kernel, closed form vs the network's own gradients") >= 0.999
    assert value(in_windows, "window ablation (length 0.1) vs gradient kernel") >= 0.98


def test_sampling_predicts_windows_in_order_and_in_size_with_nothing_fitted(in_windows):
    assert value(in_windows, "window ablation vs sampled BIF", ": r") >= 0.95
    assert abs(value(in_windows, "window ablation vs sampled BIF", ": slope") - 1) <= 0.15


def test_damped_influence_predicts_windows_in_order_and_in_size(in_windows):
    assert value(in_windows, "exact damped", ": r") >= 0.98
    assert abs(value(in_windows, "exact damped", ": slope") - 1) <= 0.15


def test_measured_windows_have_the_size_of_rate_times_window_times_gradient_products(lab):
    """A lost factor would leave every correlation as it is. An item that is left out is not first order in 25 steps."""
    centres = [step + WINDOW // 2 for step in lab.steps]
    products = -RATE * WINDOW * gradient_products(lab.aligned, centres)
    kernel = window_kernel(lab, RATE * np.array(centres))
    off = lab.off_diagonal
    assert slope(kernel[:, off], products[:, off]) == pytest.approx(1, abs=0.03)
    assert slope(products[:, off], lab.matrix(lab.measured_windows)[:, off]) == pytest.approx(1, abs=0.2)


def test_extrema_of_the_sweep_of_windows_lie_where_those_of_the_gradient_kernel_do(in_windows):
    assert value(in_windows, "sweep of windows", "distance") <= RATE * REDUCED.window_starts.step


def test_training_repairs_what_a_window_did(in_windows):
    least, most = check(in_windows, "sweep of windows", "least and largest share").values
    assert 0 <= least <= most
    assert most * value(in_windows, "mean loss of an item") < 1e-4


def test_whole_run_influence_peaks_later_than_that_of_a_moment(in_windows):
    for kind in KINDS.values():
        moment, whole = check(in_windows, f"harmful peak of {kind} pairs").values
        assert moment < whole


@pytest.mark.parametrize("kind", FLIPS)
def test_sampled_influence_flips_at_the_time_of_the_closed_form(turned, kind):
    flip = check(turned, f"sign flip of {kind} pairs")
    assert flip.value == pytest.approx(FLIPS[kind], abs=0.1)
    assert flip.lower[0] <= FLIPS[kind] <= flip.upper[0]
    assert flip.target[0] == pytest.approx(FLIPS[kind], abs=0.01)


def test_flips_come_coarse_to_fine(turned):
    flips = [value(turned, f"sign flip of {kind} pairs") for kind in ("cross", "cousin", "sibling")]
    assert flips == sorted(flips)
    assert min(np.diff(flips)) > 0.2


@pytest.mark.parametrize("kind", KINDS.values())
def test_harmful_peaks_are_in_the_onset_band_of_the_branch_that_parts_the_pair(turned, lab, kind):
    found = check(turned, "harmful peak of a window", kind)
    lower, upper = found.target
    spacing = RATE * max(np.diff([step for step in lab.steps if step <= 1000]))
    assert lower - spacing / 2 <= found.value <= upper + spacing / 2


def test_harmful_peaks_are_nearer_to_their_onsets_than_at_random(turned):
    """With the definition of an onset that the figure shows, 10% of the separation, and that of 5%."""
    peaks = "harmful peaks of the three kinds", "5%, 10%, 20%"
    distances, ps = (check(turned, *peaks, what).values for what in ("mean distance", "permutation p"))
    assert (len(distances), len(ps)) == (3, 3)
    assert max(distances) < 0.6
    assert min(distances) < 0.25
    assert max(ps) <= 1


def test_table_of_turns_has_both_kinds_of_influence_for_every_branch(turned):
    (table,) = [part for part in turned.section.parts if isinstance(part, Table)]
    expected = [(kind, what) for kind in KINDS.values() for what in ("at an instant", "of a window")]
    assert [(row[0], row[1]) for row in table.rows] == expected
    true_flips = [float(row[3]) for row in table.rows[::2]]
    np.testing.assert_allclose(true_flips, list(FLIPS.values()), atol=0.01)


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


def test_balanced_curves_are_one_and_lopsided_ones_are_not(symmetric):
    assert value(symmetric, "balanced tree: dog on all plants") <= 1e-6
    assert value(symmetric, "lopsided tree: dog on all plants") > 0.05
    assert value(symmetric, "lopsided tree, window ablation vs gradient kernel") >= 0.98


def test_figure_of_symmetry_names_the_plants_whose_curves_coincide(symmetric):
    balanced, lopsided = plate(symmetric, "symmetry").axes[:2]
    assert [text.get_text() for text in balanced.get_legend().texts] == ["→ oak, pine, lily, rose"]
    assert [text.get_text() for text in lopsided.get_legend().texts] == [
        "→ oak, pine",
        "→ lily, rose, iris",
        "→ stone",
    ]
