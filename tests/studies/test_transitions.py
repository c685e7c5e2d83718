"""The experiment on what happens when, on a small lab."""

import numpy as np
import pytest
from reading import assert_whole, check, value

from stagewise.reporting.tables import Table
from stagewise.studies.hierarchy.experiments.transitions import transitions
from stagewise.studies.hierarchy.settings import RATE
from stagewise.studies.hierarchy.theory.tree import KINDS

FLIPS = {"cross": 1.28, "cousin": 1.56, "sibling": 2.41}
"""When the residuals of two items part, by the closed form from a0 = 1e-4."""


@pytest.fixture(scope="module")
def turned(lab):
    return transitions(lab)


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


def test_no_target_is_missed_no_figure_empty_and_no_number_nan(turned):
    assert_whole(turned)
