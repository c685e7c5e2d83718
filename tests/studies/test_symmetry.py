"""The experiment on balanced and lopsided trees, on a small lab."""

import pytest
from reading import assert_whole, plate, value

from stagewise.studies.hierarchy.experiments.symmetry import symmetry


@pytest.fixture(scope="module")
def symmetric(lab):
    return symmetry(lab)


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


def test_no_target_is_missed_no_figure_empty_and_no_number_nan(symmetric):
    assert_whole(symmetric)
