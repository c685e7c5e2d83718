"""The largest influences of every query, found block by block, are those of the whole matrix."""

import numpy as np
import pytest
import xarray as xr
from synthetic_traces import Traces, losses, tree

from stagewise.influence import strongest as module
from stagewise.influence.bif import bif
from stagewise.influence.strongest import strongest


@pytest.fixture(autouse=True)
def _trusted(monkeypatch):
    judged = xr.Dataset({"verdict": "ok", "advice": ""})
    monkeypatch.setattr("stagewise.influence.trusted.diagnose", lambda *_: judged)


def by_sorting(whole, count):
    """Names, values and errors of the matrix of all pairs, ``(query, way, rank)``."""
    value = whole["value"].transpose("query", "train").values
    order = np.argsort(value, 1)
    chosen = np.stack([order[:, :count], order[:, ::-1][:, :count]], 1)

    def picked(name):
        columns = whole[name].transpose("query", "train").values
        return np.stack([row[places] for row, places in zip(columns, chosen, strict=True)])

    return whole["train"].values[chosen], picked("value"), picked("stderr")


def same(found, whole, count):
    names, value, stderr = by_sorting(whole, count)
    np.testing.assert_array_equal(found["train"], names)
    np.testing.assert_allclose(found["value"], value, rtol=1e-10)
    np.testing.assert_allclose(found["stderr"], stderr, rtol=1e-10)


@pytest.mark.parametrize("block", [1, 60, 2**22])
def test_samples_are_those_of_the_whole_matrix_whatever_the_size_of_blocks(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    traces = Traces({7: tree(losses(40), {"val": losses(9, seed=1), "more": losses(3, seed=2)}, kappa=2.5)})
    found, whole = strongest(traces, 4).isel(step=0), bif(traces, grouped=False).isel(step=0)
    assert found["value"].dims == ("query", "way", "rank")
    assert found["way"].values.tolist() == ["helpful", "harmful"]
    assert found["query"].values.tolist() == whole["query"].values.tolist()
    assert (found["value"].sel(way="helpful", rank=0) < 0).all()
    same(found, whole, 4)


def test_tokens_of_any_weight_and_groups_of_queries_are_those_of_the_whole_matrix():
    one, share = tree(losses(6, 5), {"val": losses(4, 5, seed=1)}), np.linspace(0, 1, 30).reshape(6, 5)
    one["train/share"] = one["train/share"].copy(data=share / share.sum())
    traces = Traces({7: one})
    labels = {"val": list("abba")}
    for options in ({}, {"query_groups": labels}):
        whole = bif(traces, tokens=True, grouped=False, **options).isel(step=0)
        same(strongest(traces, 3, tokens=True, **options).isel(step=0), whole, 3)


def test_draws_that_fill_no_stretch_are_left_out_as_they_are_of_the_whole_matrix():
    traces = Traces({7: tree(losses(5, draws=43), {"val": losses(2, draws=43, seed=1)})})
    same(strongest(traces, 2).isel(step=0), bif(traces, grouped=False).isel(step=0), 2)


@pytest.mark.parametrize("block", [1, 4, 2**22])
def test_a_sample_is_not_its_own_best_helper_where_that_is_not_wanted_whatever_the_size_of_blocks(monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    loss = losses(4)
    one = tree(loss, {"train": loss})
    one["queries/train"].attrs["is_training_set"] = True
    kept, apart = (strongest(Traces({7: one}), 4, self_pairs=pairs).isel(step=0) for pairs in (True, False))
    assert kept["train"].sel(way="helpful", rank=0).values.tolist() == kept["query"].values.tolist()
    names = apart["train"].sel(way="helpful")
    for query in names["query"].values.tolist():
        assert sorted(names.sel(query=query).values.tolist()) == ["", *(n for n in "0123" if n != query)]
        assert np.isnan(apart["value"].sel(query=query, way="helpful", rank=3))
    with pytest.raises(ValueError, match="single queries"):
        strongest(Traces({7: one}), query_groups={"train": list("aabb")}, self_pairs=False)


def test_a_late_block_that_holds_nothing_new_leaves_the_places_of_earlier_ones(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    rising, query = losses(32), losses(5, seed=1)
    rising[..., 12:] *= 1e-3  # no covariance there is among the strongest
    traces = Traces({7: tree(rising, {"val": query})})
    same(strongest(traces, 3).isel(step=0), bif(traces, grouped=False).isel(step=0), 3)


def test_no_count_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        strongest(Traces({7: tree(losses(3), {"val": losses(2)})}), 0)
