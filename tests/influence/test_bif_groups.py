import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from synthetic_traces import Traces, losses, tree
from torch import nn

from stagewise.groups import query_groups
from stagewise.influence import pairs
from stagewise.influence.bif import bif
from stagewise.task import Task
from stagewise.traces.store import Cell, TraceStore

KINDS = ["covariance", "correlation"]


def mean_over_pairs(ungrouped, train_labels, query_labels, allowed=None):
    """Value, stderr and replicates of group means from those of all pairs, by brute force."""
    train_labels, query_labels = np.ravel(train_labels), np.ravel(query_labels)
    replicates = ungrouped["replicates"].values[0]
    result = {}
    for a, b in itertools.product(sorted(set(train_labels)), sorted(set(query_labels))):
        pair = np.outer(train_labels == a, query_labels == b)
        if allowed is not None and (pair & allowed).any():
            pair &= allowed
        means = replicates[:, pair].mean(1)
        result[a, b] = means.mean(), means.std(ddof=1) / np.sqrt(len(means))
    return result


def assert_equal(grouped, expected):
    assert grouped.sizes["train"] * grouped.sizes["query"] == len(expected)
    for (a, b), (value, stderr) in expected.items():
        cell = grouped.sel(train=a, query=b).isel(step=0)
        np.testing.assert_allclose(cell["value"], value, rtol=0, atol=1e-12)
        np.testing.assert_allclose(cell["stderr"], stderr, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_groups_value_is_the_mean_over_its_pairs_of_samples(kind):
    traces = Traces({0: tree(losses(7), {"val": losses(5, seed=1)})})
    of_train, of_query = list("abacbba"), list("xyyxx")
    grouped = bif(traces, train_groups=of_train, query_groups={"val": of_query}, kind=kind)
    assert_equal(grouped, mean_over_pairs(bif(traces, grouped=False, kind=kind), of_train, of_query))
    assert grouped["train_size"].values.tolist() == [3, 3, 1]
    assert grouped["query_size"].values.tolist() == [3, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_groups_value_is_the_mean_over_its_pairs_of_tokens(kind):
    random = np.random.default_rng(0)
    of_train, of_query = random.choice(list("abc"), (4, 3)), random.choice(list("xy"), (3, 3))
    traces = Traces({0: tree(losses(4, 3), {"val": losses(3, 3, seed=1)})})
    options = {"kind": kind, "tokens": True}
    grouped = bif(traces, train_groups=of_train, query_groups={"val": of_query}, **options)
    assert_equal(grouped, mean_over_pairs(bif(traces, grouped=False, **options), of_train, of_query))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_train", [list("abacbba"), list("0123456")])
def test_a_sample_is_not_paired_with_itself(kind, of_train):
    train = losses(7)
    traces = Traces({0: tree(train, {"val": train}, training_sets=["val"])})
    of_query = list("xxyxyyy")
    grouped = bif(traces, train_groups=of_train, query_groups={"val": of_query}, kind=kind, self_pairs=False)
    pairs_of_samples = bif(traces, grouped=False, kind=kind)
    assert_equal(grouped, mean_over_pairs(pairs_of_samples, of_train, of_query, ~np.eye(7, dtype=bool)))
    single = bif(traces, query_groups={"val": of_query}, kind=kind, self_pairs=False)
    expected = mean_over_pairs(pairs_of_samples, range(7), of_query, ~np.eye(7, dtype=bool))
    assert_equal(single, {(str(a), b): numbers for (a, b), numbers in expected.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_a_sample_counts_with_itself_as_in_retraining(kind):
    train, of_train, of_query = losses(7), list("abacbba"), list("xxyxyyy")
    traces = Traces({0: tree(train, {"val": train}, training_sets=["val"])})
    grouped = bif(traces, train_groups=of_train, query_groups={"val": of_query}, kind=kind)
    pairs_of_samples = bif(traces, grouped=False, kind=kind)
    assert_equal(grouped, mean_over_pairs(pairs_of_samples, of_train, of_query, np.ones((7, 7), dtype=bool)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centring", ["pooled", "between"])
def test_tokens_of_one_sequence_are_not_paired(kind, centring):
    random = np.random.default_rng(0)
    train, of_train, of_query = losses(5, 3), random.choice(list("abc"), (5, 3)), random.choice(list("xy"), (5, 3))
    traces = Traces({0: tree(train, {"val": train}, training_sets=["val"])})
    options = {"kind": kind, "tokens": True, "centring": centring}
    grouped = bif(traces, train_groups=of_train, query_groups={"val": of_query}, self_pairs=False, **options)
    sequence = np.repeat(np.arange(5), 3)
    other = sequence[:, None] != sequence
    assert_equal(grouped, mean_over_pairs(bif(traces, grouped=False, **options), of_train, of_query, other))


def test_blocks_of_chains_in_a_store_are_pooled_and_know_the_training_set(tmp_path):
    train = losses(6)
    whole = tree(train, {"val": train}, training_sets=["val"])
    store = TraceStore.open(tmp_path / "run", {"model": "a"})
    for block in range(2):
        chains = slice(8 * block, 8 * block + 8)
        paths = ("chains", "train", "queries/val")
        part = xr.DataTree.from_dict({path: whole[path].to_dataset().isel(chain=chains) for path in paths})
        part.attrs = whole.attrs
        store.write(Cell(7, block, "key"), part)
    options = {"train_groups": list("aabbcc"), "query_groups": {"val": list("xxxyyy")}, "self_pairs": False}
    xr.testing.assert_allclose(bif(store, **options), bif(Traces({7: whole}), **options), rtol=1e-5)


def test_a_sample_is_paired_with_itself_where_it_has_no_other_partner():
    train = losses(4)
    options = {"train_groups": list("abcc"), "query_groups": {"val": list("abcc")}, "self_pairs": False}
    marked = bif(Traces({0: tree(train, {"val": train}, training_sets=["val"])}), **options)["value"][0]
    unmarked = bif(Traces({0: tree(train, {"val": train})}), **options)["value"][0]
    same = np.isclose(marked, unmarked, rtol=0, atol=1e-12)
    assert same.tolist() == [[True, True, True], [True, True, True], [True, True, False]]
    assert (np.diag(marked)[:2] < 0).all()  # a sample helps itself


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_loss_in_a_group_gives_no_nan(kind):
    train = losses(4)
    train[..., [0, 1]] = 0.1
    traces = Traces({0: tree(train, {"val": train}, training_sets=["val"])})
    got = bif(traces, train_groups=list("aabb"), query_groups={"val": list("aabb")}, kind=kind)
    for name in ("value", "stderr", "replicates"):
        assert np.isfinite(got[name]).all()
    assert np.abs(got["value"].sel(train="a")).max() < 1e-15


def test_a_samples_loss_is_the_mean_over_its_tokens():
    train, query = losses(4, 3), losses(2, 5, seed=1)
    with_tokens = bif(Traces({0: tree(train, {"val": query})}), grouped=False)
    averaged = bif(Traces({0: tree(train.mean(-1), {"val": query.mean(-1)})}), grouped=False)
    np.testing.assert_allclose(with_tokens["value"], averaged["value"], rtol=0, atol=1e-12)


def test_the_weights_of_a_samples_tokens_add_up_to_the_weight_of_the_sample():
    traces = Traces({0: tree(losses(4, 3), {"val": losses(2, 5, seed=1)})})
    tokens, samples = bif(traces, tokens=True), bif(traces)
    assert tokens["train"].values.tolist()[:4] == ["0/0", "0/1", "0/2", "1/0"]
    total = tokens["value"].values.reshape(4, 3).sum(1)
    np.testing.assert_allclose(total, samples["value"].values.reshape(4), rtol=0, atol=1e-12)


def test_labels_of_samples_also_name_their_tokens():
    traces = Traces({0: tree(losses(4, 3), {"val": losses(2, 5, seed=1)})})
    by_sample = bif(traces, train_groups=list("abba"), tokens=True)
    by_token = bif(traces, train_groups=np.repeat(list("abba"), 3).reshape(4, 3), tokens=True)
    np.testing.assert_array_equal(by_sample["value"], by_token["value"])
    assert by_sample["train_size"].values.tolist() == [6, 6]


def test_tokens_need_tokens():
    with pytest.raises(ValueError, match="tokens=True needs a loss that returns"):
        bif(Traces({0: tree(losses(4), {"val": losses(2)})}), tokens=True)


def test_carried_labels_are_used_unless_others_are_given_or_groups_declined():
    labels = {"train": np.array(list("abba")), "queries": {"val": np.array(list("xyx")), "test": None}}
    traces = Traces({0: tree(losses(4), {"val": losses(3), "test": losses(2)})}, labels)
    carried = bif(traces)
    assert carried["train"].values.tolist() == ["a", "b"]
    assert carried["query"].values.tolist() == ["val:x", "val:y", "test"]
    given = bif(traces, train_groups=[10, 9, 9, 10], query_groups={"test": ["u", "u"]})
    assert given["train"].values.tolist() == ["9", "10"]
    assert given["query"].values.tolist() == ["val:x", "val:y", "test:u"]
    declined = bif(traces, grouped=False)
    assert declined["train"].values.tolist() == ["0", "1", "2", "3"]
    assert declined["query"].values.tolist() == ["val:0", "val:1", "val:2", "test:0", "test:1"]


@pytest.mark.parametrize(
    "labels",
    [{"val": list("xyx")}, {"val": [10, 9, 10], "test": list("uu")}, {"test": list("uv")}, {}],
)
@pytest.mark.parametrize("sets", [("val",), ("val", "test")])
def test_query_groups_are_called_as_retraining_calls_them(labels, sets):
    sizes = {"val": 3, "test": 2}
    labels = {name: labels[name] for name in sets if name in labels}
    queries = {name: torch.zeros(sizes[name], 1) for name in sets}
    loss = lambda model, x: model(x)[:, 0]  # noqa: E731
    task = Task(nn.Linear(1, 1), loss, train=torch.zeros(4, 1), queries=queries, query_groups=labels)
    cell = tree(losses(4), {name: losses(sizes[name]) for name in sets})
    traces = Traces({0: cell}, {"train": task.train_groups, "queries": task.query_groups})
    assert tuple(bif(traces)["query"].values) == query_groups(task).labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_groups": list("abc")}, r"train_groups: expected labels of shape \(4,\), got \(3,\)"),
        ({"query_groups": {"val": list("ab")}}, r"query_groups\['val'\]: expected labels of shape \(3,\)"),
        ({"query_groups": {"val": [list("ab")]}}, r"query_groups\['val'\] needs a loss that returns \(batch, tokens\)"),
        ({"query_groups": {"vall": list("abc")}}, r"names \['vall'\], but the traces have the queries \['val'\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bif(Traces({0: tree(losses(4), {"val": losses(3)})}), **options)


def test_two_query_groups_of_one_name_are_refused():
    traces = Traces({0: tree(losses(4), {"a": losses(2), "a:x": losses(2)})})
    with pytest.raises(ValueError, match="2 query groups are called 'a:x'"):
        bif(traces, query_groups={"a": list("xx")})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_train", [None, list("abacbba")])
def test_blocks_change_nothing(monkeypatch, kind, of_train):
    train = losses(7)
    traces = Traces({0: tree(train, {"val": train, "test": losses(3, seed=1)}, training_sets=["val"])})
    options = {"train_groups": of_train, "query_groups": {"val": list("xxyxyyy")}, "kind": kind, "self_pairs": False}
    whole = bif(traces, **options)
    monkeypatch.setattr(pairs, "_BLOCK", 40)
    monkeypatch.setattr(pairs, "_KEPT", 0)
    blocked = bif(traces, **options)
    np.testing.assert_allclose(blocked["value"], whole["value"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(blocked["stderr"], whole["stderr"], rtol=0, atol=1e-12)
    assert "replicates" in whole
    assert "replicates" not in blocked


@pytest.mark.parametrize("kind", KINDS)
def test_queries_are_made_ready_once_for_all_blocks(monkeypatch, kind):
    """Or a kernel of a thousand samples standardises all of them a thousand times."""
    seen, whole = [], pairs.Estimator.side
    monkeypatch.setattr(pairs, "_BLOCK", 1)
    monkeypatch.setattr(pairs.Estimator, "side", lambda self, of: seen.append(len(of.names)) or whole(self, of))
    train = losses(7)
    bif(Traces({0: tree(train, {"val": losses(5, seed=1)})}), kind=kind, grouped=False)
    assert sorted(seen) == [1] * 7 + [5]


def test_replicates_are_left_out_where_any_query_set_has_too_many(monkeypatch):
    monkeypatch.setattr(pairs, "_KEPT", 16 * 4 * 2)
    traces = Traces({0: tree(losses(4), {"few": losses(2), "many": losses(3)})})
    assert "replicates" not in bif(traces, grouped=False)
    assert "replicates" in bif(traces)
