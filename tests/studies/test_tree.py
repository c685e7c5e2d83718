import numpy as np
import pytest

from stagewise.studies.hierarchy.theory.tree import KINGDOMS, LOPSIDED, Concept, Items


def test_kingdoms_have_the_features_and_singular_values_of_a_three_level_binary_tree():
    features = KINGDOMS.features()
    assert features.shape == (15, 8)
    assert features[0].all()
    np.testing.assert_array_equal(features[1], [1, 1, 1, 1, 0, 0, 0, 0])  # animal
    np.testing.assert_array_equal(features[7:], np.eye(8))
    values = np.linalg.svd(features)[1]
    np.testing.assert_allclose(values, np.sqrt([15, 7, 3, 3, 1, 1, 1, 1]))


def test_balanced_trees_are_the_named_one_and_any_other_shape():
    np.testing.assert_array_equal(Concept.balanced(3).features(), KINGDOMS.features())
    assert len(Concept.balanced(2, 3).names) == 9
    np.testing.assert_array_equal(Concept.balanced(1, 3).split_level(), 1 - np.eye(3, dtype=int))


def test_pairs_part_on_the_level_of_their_lowest_common_concept():
    level = KINGDOMS.split_level()
    assert (level[0, 0], level[0, 1], level[0, 2], level[0, 6]) == (0, 3, 2, 1)  # dog, cat, sparrow, lily
    np.testing.assert_array_equal(level, level.T)


def test_lopsided_items_that_hang_high_stand_for_themselves_below():
    names = LOPSIDED.names
    kingdoms, kinds, leaves = LOPSIDED.groupings()
    stone, trout = names.index("stone"), names.index("trout")
    assert kingdoms[stone] == kinds[stone] == leaves[stone] == "stone"
    assert (kinds[trout], leaves[trout]) == ("fish", "trout")
    level = LOPSIDED.split_level()
    assert (level[stone][: len(names) - 1] == 1).all()
    assert level[trout, names.index("dog")] == 2


def test_tree_of_one_leaf_is_one_item_with_one_feature():
    single = Concept("only")
    assert (single.names, single.depth, single.groupings()) == (["only"], 0, [])
    np.testing.assert_array_equal(single.split_level(), [[0]])
    np.testing.assert_array_equal(Items.of(single).targets, [[1.0]])


def test_concepts_with_one_name_are_refused():
    with pytest.raises(ValueError, match="'dog' 2 times"):
        Concept.of("thing", {"animal": ["dog"], "pet": ["dog"]})
    with pytest.raises(ValueError, match="branching >= 1"):
        Concept.balanced(2, 0)


def test_diffused_features_keep_the_similarities_of_the_tree():
    # Features agree on items that part on level L of 3 with correlation (1 - 2 flip)^(2 (4 - L)).
    items = Items.of(KINGDOMS, diffused=40_000, flip=0.1, seed=3)
    similarity = items.targets @ items.targets.T / 40_000
    level = KINGDOMS.split_level()
    for split in (1, 2, 3):
        np.testing.assert_allclose(similarity[level == split], 0.8 ** (2 * (4 - split)), atol=0.02)
    assert set(np.unique(items.targets)) == {-1.0, 1.0}


def test_noise_changes_what_is_shown_and_not_the_truth():
    clean, noisy = Items.of(KINGDOMS), Items.of(KINGDOMS, noise=0.5, seed=1)
    np.testing.assert_array_equal(clean.targets, noisy.targets)
    difference = noisy.shown_targets - clean.shown_targets
    assert 0.4 < difference.std() < 0.6
    np.testing.assert_array_equal(noisy.white_targets(), noisy.shown_targets.T)


def test_counts_repeat_items_and_bad_ones_are_named():
    items = Items.of(KINGDOMS, counts={"cat": 3})
    assert np.bincount(items.shown).tolist() == [1, 3, 1, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"every item once in the training set, \['cat'\]"):
        items.white_targets()
    with pytest.raises(ValueError, match="'cow': 2"):
        Items.of(KINGDOMS, counts={"cow": 2})
    with pytest.raises(ValueError, match="flip=2"):
        Items.of(KINGDOMS, diffused=3, flip=2)
