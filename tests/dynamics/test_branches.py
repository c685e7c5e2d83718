import numpy as np
import pytest
import xarray as xr

from stagewise.dynamics.branches import separations, squared_distances
from stagewise.dynamics.stages import rise

ITEMS = ["dog", "cat", "sparrow", "eagle", "oak", "pine", "lily", "rose"]
KINGDOM, CLASS = list("aaaapppp"), list("mmbbttff")
LEVELS = [KINGDOM, CLASS, ITEMS]
SQUARED_STRENGTH = np.array([[4, 0, 0], [4, 2, 0], [4, 2, 1]])  # (step, level): the branches open one by one


def tree_representations():
    """Items at the leaves of the tree; level L puts +-sqrt(strength) into a unit of each of its parents."""
    units = np.zeros((8, 7))
    for i in range(8):
        units[i, 0] = 1 - 2 * (i // 4)
        units[i, 1 + i // 4] = 1 - 2 * (i // 2 % 2)
        units[i, 3 + i // 2] = 1 - 2 * (i % 2)
    of_level = np.repeat(np.arange(3), [1, 2, 4])
    values = units * np.sqrt(SQUARED_STRENGTH)[:, None, of_level]
    return xr.DataArray(values, {"step": [0, 10, 20], "item": ITEMS}, ("step", "item", "unit"))


def test_distances_are_those_of_every_pair_of_items():
    values = np.random.default_rng(0).normal(size=(2, 5, 3))
    got = squared_distances(xr.DataArray(values.transpose(2, 0, 1), dims=("unit", "step", "item")))
    expected = ((values[:, :, None] - values[:, None]) ** 2).sum(-1)
    assert got.dims == ("step", "item", "other")
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_branch_curves_of_the_eight_leaf_tree_are_the_direct_means_over_its_pairs():
    distances = squared_distances(tree_representations())
    got = separations(distances, LEVELS)
    assert (got.dims, got["step"].values.tolist()) == (("level", "step"), [0, 10, 20])
    root, kingdom, leaf = SQUARED_STRENGTH.T
    # Pairs that part at the leaf, the class and the kingdom are this far apart (a difference of 2 in each unit).
    d_leaf, d_class, d_kingdom = 4 * leaf, 2 * leaf + 4 * kingdom, 2 * leaf + 2 * kingdom + 4 * root
    np.testing.assert_allclose(distances.sel(item="dog", other="cat"), d_leaf)
    np.testing.assert_allclose(distances.sel(item="dog", other="sparrow"), d_class)
    np.testing.assert_allclose(distances.sel(item="dog", other="lily"), d_kingdom)
    # Within a kingdom 2 pairs part at the leaf and 4 at the class.
    expected = [d_kingdom - (d_leaf + 2 * d_class) / 3, d_class - d_leaf, d_leaf]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_branches_open_in_the_order_in_which_the_levels_are_learned():
    distances = squared_distances(tree_representations())
    start = distances.isel(step=[0]).assign_coords(step=[-10]) * 0
    curves = separations(xr.concat([start, distances], "step"), LEVELS)
    onsets = [rise(curves.sel(level=level), str(level)).step for level in range(3)]
    assert onsets[0] < 0 < onsets[1] < 10 < onsets[2] < 20


def test_pairs_that_no_level_separates_count_as_the_rest_of_the_finest():
    distances = squared_distances(tree_representations())
    np.testing.assert_allclose(separations(distances, LEVELS[:2]), separations(distances, LEVELS)[:2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([CLASS, KINGDOM], r"labels\[1\] joins items that a coarser level separates"),
        ([KINGDOM, KINGDOM], r"labels\[1\] separates nothing"),
        ([["all"] * 8], r"labels\[0\] separates nothing"),
        ([KINGDOM[:7]], r"labels\[0\]: expected 8 labels, got shape \(7,\)"),
        ([], "got no levels"),
    ],
)
def test_labels_that_are_no_hierarchy_of_the_items_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        separations(squared_distances(tree_representations()), labels)


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="representations must have dims"):
        squared_distances(tree_representations().rename(unit="neuron"))
    with pytest.raises(ValueError, match="distances must have dims"):
        separations(tree_representations(), LEVELS)


def test_items_and_their_others_are_paired_by_name_and_not_by_position():
    distances = squared_distances(tree_representations())
    expected = separations(distances, LEVELS)
    shuffled = distances.isel(other=[3, 0, 7, 1, 2, 6, 5, 4])
    np.testing.assert_allclose(separations(shuffled, LEVELS), expected, rtol=1e-12)
    np.testing.assert_allclose(separations(distances.drop_vars(["item", "other"]), LEVELS), expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"other lacks \['oak'\]"):
        separations(distances.drop_sel(other=["oak"]), LEVELS)
