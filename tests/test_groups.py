import numpy as np
import pytest
import torch
from torch import nn

import stagewise
from stagewise.dynamics.events import Event
from stagewise.groups import TRAIN, Groups, query_groups, same_label, train_groups, words
from stagewise.task import Task


def task(n=6, queries=("val",), train_groups=None, query_groups=None, **more):
    sets = {name: torch.zeros(4, 1) for name in queries}
    return Task(
        nn.Linear(1, 1),
        lambda model, x: model(x)[:, 0],
        train=torch.zeros(n, 1),
        queries=sets,
        train_groups=train_groups,
        query_groups=query_groups,
        **more,
    )


def test_numbers_are_ordered_as_numbers_and_before_names():
    groups = Groups.of_labels(["10", "b", "9", "b", "a", "10"], "train")
    assert groups.labels == ("9", "10", "a", "b")
    assert [index.tolist() for index in groups.indices] == [[2], [0, 5], [4], [1, 3]]
    assert groups.sizes == (1, 2, 1, 2)


def test_tensor_and_string_labels_name_the_same_groups():
    numbers = Groups.of_labels(torch.tensor([2, 0, 2]), "train")
    assert numbers.labels == Groups.of_labels(["2", "0", "2"], "train").labels == ("0", "2")


def test_the_mean_is_over_each_groups_own_data_set():
    groups = query_groups(
        task(queries=("a", "b"), query_groups={"a": ["x", "y", "x", "x"], "b": ["y"] * 2 + ["z"] * 2})
    )
    assert groups.labels == ("a:x", "a:y", "b:y", "b:z")
    losses = {"a": torch.arange(8.0).reshape(2, 4), "b": 100 + torch.arange(8.0).reshape(2, 4)}
    expected = [[5 / 3, 1, 100.5, 102.5], [17 / 3, 5, 104.5, 106.5]]
    np.testing.assert_allclose(groups.mean(losses), expected, rtol=1e-6)


def test_one_labelled_query_set_keeps_bare_labels_and_an_unlabelled_one_its_name():
    assert query_groups(task(query_groups={"val": list("abab")})).labels == ("a", "b")
    assert query_groups(task()).labels == ("val",)
    mixed = query_groups(task(queries=("v", "w"), query_groups={"v": list("abab")}))
    assert mixed.labels == ("v:a", "v:b", "w")
    assert mixed.sizes == (2, 2, 4)


def test_given_labels_come_before_the_tasks_own():
    labelled = task(train_groups=list("aabbcc"))
    assert train_groups(labelled).labels == ("a", "b", "c")
    assert train_groups(labelled, [0, 1, 0, 1, 0, 1]).labels == ("0", "1")


def test_small_unlabelled_sets_are_left_out_one_by_one():
    groups = train_groups(task(n=12))
    assert groups.labels == tuple(map(str, range(12)))
    assert [index.tolist() for index in groups.indices] == [[i] for i in range(12)]


def test_large_unlabelled_sets_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="65 samples and no groups; pass groups="):
        train_groups(task(n=65))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 5, "expected one label for each"),
        ([["a", "b"]] * 6, "labels of 2 tokens .* returns one loss per sample"),
    ],
)
def test_labels_that_are_not_one_per_sample_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        train_groups(task(), labels)


def test_two_query_groups_of_one_name_are_refused():
    clash = task(queries=("a", "a:x"), query_groups={"a": ["x"] * 4})
    with pytest.raises(ValueError, match="2 groups are called 'a:x'"):
        query_groups(clash)


def test_the_mean_is_weighted_within_each_group_and_never_divides_by_nothing():
    groups = Groups.of_labels(list("aabb"), "val")
    losses = {"val": torch.tensor([[1.0, 4.0, 7.0, 9.0]], dtype=torch.float64)}
    weighted = groups.mean(losses, {"val": torch.tensor([2.0, 1.0, 0.0, 0.0])})
    np.testing.assert_allclose(weighted, [[2.0, 0.0]])
    np.testing.assert_allclose(groups.mean(losses), [[2.5, 8.0]])


def test_groups_of_candidates_are_of_the_training_sets_own_indices_and_leave_the_others_out():
    some = task(n=100, train_groups=list("ab") * 50, candidates=[3, 8, 9])
    groups = train_groups(some)
    assert groups.labels == ("a", "b")
    assert [index.tolist() for index in groups.indices] == [[8], [3, 9]]
    assert groups.datasets == (TRAIN, TRAIN)
    single = train_groups(task(n=100, candidates=[3, 8, 9]))
    assert single.labels == ("3", "8", "9")
    assert [index.tolist() for index in single.indices] == [[3], [8], [9]]


def test_labels_pass_through_text_one_by_one():
    assert words([1, 2.5, "x", True]).tolist() == ["1", "2.5", "x", "True"]
    assert words(np.array([1, 2])).tolist() == words(torch.tensor([1, 2])).tolist() == ["1", "2"]
    assert words([np.int64(1), torch.tensor(1), 1]).tolist() == ["1"] * 3
    assert train_groups(task(), [1, 1.0, "1", 2, 2, 2]).labels == ("1", "2", "1.0")


def test_a_query_label_is_that_of_a_train_group_in_one_query_set_as_in_several():
    of_train = train_groups(task(train_groups=list("aabbcc"))).labels
    labels = {"v": list("abab"), "w": list("cada")}
    expected = {"a": "a", "b": "b", "v:a": "a", "v:b": "b", "w:a": "a", "w:c": "c", "w:d": None}
    for names in (["v"], ["v", "w"]):
        of_query = query_groups(task(queries=names, query_groups={name: labels[name] for name in names})).labels
        wanted = [[expected[label] == train for label in of_query] for train in of_train]
        assert same_label(of_train, of_query).tolist() == wanted


def test_labels_are_the_same_as_text_after_the_first_colon_and_never_by_having_none():
    assert same_label([1, 2], ["1", "v:2"]).tolist() == [[True, False], [False, True]]
    assert same_label(["x:y", "y", ""], ["v:x:y", "x:y", "v", "v:"]).tolist() == [
        [True, True, False, False],
        [False, True, False, False],
        [False, False, False, True],
    ]


def test_event_is_public_and_every_public_name_is_where_it_is_said_to_be():
    assert stagewise.Event is Event
    for name in stagewise.__all__:
        assert getattr(stagewise, name) is not None


def test_a_single_sample_is_not_the_class_that_is_called_by_its_number():
    assert not same_label(range(3), ["0", "1"], [1, 1, 1]).any()
    assert same_label(["a", "b"], ["a"], [1, 1]).tolist() == [[True], [False]]  # groups that hold one sample each
    assert same_label(range(2), ["0"], [5, 1]).tolist() == [[True], [False]]
