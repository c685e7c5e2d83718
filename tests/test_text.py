"""Kinds of tokens, by the rules that the documentation states."""

import numpy as np
import pytest

from stagewise.text import EXCLUSIVE, token_kinds, token_labels


def kinds_of(*texts, sequence=None, **settings):
    """The kinds of every predicted token of one sequence of texts."""
    vocabulary = list(dict.fromkeys(texts))
    found = token_kinds([[vocabulary.index(text) for text in texts]], vocabulary.__getitem__, **settings)
    return [[kind for kind in EXCLUSIVE if found[kind][0, place]] for place in range(len(texts) - 1)]


@pytest.mark.parametrize(
    ("before", "text", "after", "expected"),
    [
        ("x", " dog", "s", ["word start"]),
        (" dog", "s", " run", ["word end"]),
        (" un", "der", "stand", ["word part"]),
        (" un", "der", "", ["word end"]),
        (" stra", "ß", "e", ["word part"]),
        ("x", "(", "y", ["left delimiter"]),
        ("x", " [", "y", ["left delimiter"]),
        ("x", '("', "y", ["left delimiter"]),
        ("x", '")', "y", ["right delimiter"]),
        ("x", "})", ";", ["right delimiter"]),
        ("x", ").", " The", ["right delimiter"]),
        ("x", "()", ":", []),
        ("x", '"', "y", []),  # it opens and closes
        ("x", " 42", "y", ["numeric"]),
        ("x", "4a", "y", []),
        ("x", "\n\n", "y", ["formatting", "spacing"]),
        ("x", "    ", "y", ["spacing"]),
        ("x", "\t", "y", ["formatting", "spacing"]),
        ("x", " --", "y", ["formatting"]),
        ("x", "_", "y", []),
        ("x", "�", "y", []),
    ],
)
def test_a_token_is_of_the_kinds_that_its_text_says(before, text, after, expected):
    assert kinds_of(before, text, after)[0] == expected


def test_the_last_letters_of_a_sequence_may_go_on_and_are_of_no_kind():
    assert kinds_of(" un", "der") == [[]]


def test_a_pair_seen_before_is_an_induction_pattern_where_its_end_came_before():
    reference = [[0, 9] * 50 + [0, 1]]  # 1 seldom follows 0, 9 does nearly always
    sequences = [[0, 1, 5, 0, 1], [0, 9, 5, 0, 9], [0, 1, 0, 1, 5], [3, 3, 3, 3, 3]]
    found = token_kinds(sequences, lambda token: f" {'abcdefghij'[token]}", reference=reference)["induction pattern"]
    assert found[0].tolist() == [False, False, False, True]
    assert not found[1].any()  # the language tells, not the context
    assert found[2].tolist() == [False, False, True, False]
    assert found[3].tolist() == [False, False, True, True]  # c c overlaps itself once


def test_white_space_that_repeats_is_no_pattern():
    found = token_kinds([[0, 1, 2, 0, 1]], ["\n", "  ", " x"].__getitem__, reference=[[0, 2] * 50])
    assert not found["induction pattern"].any()


def test_labels_are_of_the_predicted_tokens_and_what_is_rarer_comes_first():
    kinds = token_kinds([[0, 1, 2], [1, 2]], [" a", "\n", "("].__getitem__)
    labels = token_labels(kinds)
    assert labels.tolist() == [["formatting", "left delimiter"], ["left delimiter", ""]]
    own = np.array([[True, True], [False, True]])
    mixed = token_labels({"mine": own, "formatting": kinds["formatting"]})
    assert mixed.tolist() == [["formatting", "mine"], ["", "mine"]]


def test_sequences_without_a_predicted_token_are_refused():
    with pytest.raises(ValueError, match="two tokens or more"):
        token_kinds([[1], []], str)
