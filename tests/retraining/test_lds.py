import numpy as np
import pytest
import xarray as xr
from problems import N, Regression
from scipy.stats import spearmanr

from stagewise.retraining.lds import lds
from stagewise.retraining.leave_out import leave_out, retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.scores import measured_influence

TRAINS, QUERIES, REPLAYS, STEPS = list("abcdefgh"), ["p", "q", "r"], 40, [0, 10]


def random(seed=0):
    return np.random.default_rng(seed)


def attribution(seed=0, queries=QUERIES, size=3):
    value = random(seed).normal(size=(len(STEPS), len(TRAINS), len(queries)))
    coords = {
        "step": STEPS,
        "train": TRAINS,
        "query": queries,
        "train_size": ("train", [size] * len(TRAINS)),
    }
    return xr.Dataset({"value": (("step", "train", "query"), value)}, coords)


def subsets(seed=1, replays=REPLAYS):
    return xr.DataArray(random(seed).random((replays, len(TRAINS))) < 0.6, {"train": TRAINS}, ("replay", "train"))


def additive(given, kept):
    """Losses to which every sample that is left out adds minus its influence."""
    effect = -given.value * given.train_size
    losses = 5 + (~kept).astype(float).dot(effect, dim="train")
    return losses.transpose("step", "replay", "query")


def test_additive_losses_score_one_with_certainty_and_with_the_wrong_sign_minus_one():
    given, kept = attribution(), subsets()
    losses = additive(given, kept)
    for sign in (1, -1):
        got = lds(given.assign(value=sign * given.value), losses, kept)
        for name in ("lds", "lds_lower", "lds_upper"):
            np.testing.assert_allclose(got[name], sign, rtol=1e-12)
        assert got["queries"].values.tolist() == [3, 3]


def test_unequal_group_sizes_weigh_the_groups():
    given, kept = attribution(), subsets()
    given = given.assign_coords(train_size=("train", np.array([1, 50, 3, 7, 1, 20, 2, 9])))
    np.testing.assert_allclose(lds(given, additive(given, kept), kept).lds, 1, rtol=1e-12)


def test_an_unrelated_attribution_scores_near_zero_and_the_interval_covers_zero_as_often_as_it_says():
    covered = []
    for seed in range(40):
        given, kept = attribution(seed), subsets(100 + seed)
        losses = additive(given, kept).copy(data=random(200 + seed).normal(size=(2, REPLAYS, 3)))
        got = lds(given, losses, kept, resamples=300)
        covered += ((got.lds_lower <= 0) & (got.lds_upper >= 0)).values.tolist()
        assert (abs(got.lds) < 0.5).all()
    assert 0.85 < np.mean(covered) <= 1


def test_it_is_scipys_spearman_averaged_over_queries_at_each_step_also_with_ties():
    given, kept = attribution(), subsets()
    exact = additive(given, kept)
    losses = (exact + random(3).normal(size=exact.shape) * 5).round()  # whole nats: many ties
    got = lds(given, losses, kept)
    expected = np.array([[spearmanr(exact[s, :, q], losses[s, :, q])[0] for q in range(3)] for s in range(2)])
    np.testing.assert_allclose(got.spearman, expected, rtol=1e-10)
    np.testing.assert_allclose(got.lds, expected.mean(1), rtol=1e-10)
    assert (got.lds_lower < got.lds).all()
    assert (got.lds < got.lds_upper).all()


def test_the_bootstrap_is_that_of_replays_and_queries_drawn_one_by_one():
    given, kept = attribution(), subsets()
    exact = additive(given, kept)
    losses = exact + random(3).normal(size=exact.shape) * 5
    got, draw, slow = lds(given, losses, kept, resamples=4000), random(7), []
    for _ in range(1000):
        runs, queries = draw.integers(REPLAYS, size=REPLAYS), draw.integers(3, size=3)
        slow.append(np.mean([spearmanr(exact[0, runs, q], losses[0, runs, q])[0] for q in queries]))
    lower, upper = np.quantile(slow, [0.025, 0.975])
    np.testing.assert_allclose([got.lds_lower[0], got.lds_upper[0]], [lower, upper], atol=0.03)


def test_replays_that_never_learnt_the_query_do_not_count_for_it():
    given, kept = attribution(queries=["a", "b", "other"]), subsets()
    losses = additive(given, kept)
    for query in "ab":  # without its data the query's loss is another story
        gone = ~kept.sel(train=query).values
        losses.loc[{"query": query}] = np.where(gone, -100 * losses.sel(query=query), losses.sel(query=query))
    for name in ("lds", "lds_lower", "lds_upper"):
        np.testing.assert_allclose(lds(given, losses, kept)[name], 1, rtol=1e-12)
    # The same losses under another name do count.
    renamed = ["x", "y", "other"]
    other = lds(given.assign_coords(query=renamed), losses.assign_coords(query=renamed), kept)
    assert (other.lds < 0.9).all()


def test_queries_that_do_not_vary_are_left_out_of_the_mean_and_counted():
    given, kept = attribution(), subsets()
    losses = additive(given, kept)
    losses.loc[{"query": "p", "step": 0}] = 0.1
    # The same for all: predictions differ by rounding only between subsets of one size.
    equal = xr.DataArray(
        [np.roll([True] * 5 + [False] * 3, k) for k in range(8)], {"train": TRAINS}, ("replay", "train")
    )
    got = lds(given, losses, kept)
    assert got["queries"].values.tolist() == [2, 3]
    np.testing.assert_allclose(got.lds, 1, rtol=1e-12)
    given = given.assign_coords(train_size=("train", [11, 1, 1, 19, 22, 1, 38, 44]))
    constant = given.assign(value=xr.full_like(given.value, 0.1) / given.train_size)
    none = lds(constant, additive(given, equal), equal)
    assert none["queries"].values.tolist() == [0, 0]
    assert np.isnan(none.lds).all()
    assert np.isnan(none.lds_lower).all()


def test_labels_not_positions_decide_what_is_compared():
    given, kept = attribution(), subsets()
    losses = additive(given, kept).isel(query=[2, 0, 1], step=[1])
    got = lds(given.isel(train=[3, 1, 0, 2, 7, 6, 5, 4]), losses, kept.isel(train=slice(None, None, -1)))
    np.testing.assert_allclose(got.lds, 1, rtol=1e-12)
    assert got.step.values.tolist() == [10]
    assert got["query"].values.tolist() == ["r", "p", "q"]


def test_retrained_subsets_of_a_regression_are_ordered_by_their_measured_influence():
    problem, order = Regression(train_groups=None), BatchOrder(N)
    start = problem.trajectory(np.array([1.0, -0.5, 2.0, 0.3]), 0).load(0)
    kept = xr.DataArray(random(0).random((30, N)) < 0.9, {"train": [str(i) for i in range(N)]}, ("replay", "train"))
    runs = [Schedule.whole_run(np.flatnonzero(~row), 0.0) for row in kept.values]
    losses = retrain(problem.task, start, runs, order, [5, 20])
    influence = measured_influence(leave_out(problem.task, start, order, [5, 20]))
    got = lds(influence, losses, kept)
    assert (got.lds > 0.9).all()


def test_what_does_not_match_is_named():
    given, kept = attribution(), subsets()
    losses = additive(given, kept)
    with pytest.raises(ValueError, match=r"attribution lacks step \[0\]"):
        lds(given.isel(step=[1]), losses, kept)
    with pytest.raises(ValueError, match=r"attribution lacks query \['p'\]"):
        lds(given.drop_sel({"query": ["p"]}), losses, kept)
    with pytest.raises(ValueError, match=r"attribution lacks train \['c'\]"):
        lds(given.drop_sel(train=["c"]), losses, kept)
    with pytest.raises(ValueError, match=r"which replays have kept train \['c'\]"):
        lds(given, losses, kept.drop_sel(train=["c"]))
    with pytest.raises(ValueError, match="40 replays, but kept has 39"):
        lds(given, losses, kept[1:])
    with pytest.raises(ValueError, match="kept must have dims"):
        lds(given, losses, kept.rename(replay="subset"))
    losses[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"steps \[10\] are not finite"):
        lds(given, losses, kept)


def test_a_query_scores_the_same_with_one_query_set_as_with_two():
    bare = ["a", "b", "other"]
    given, kept = attribution(queries=bare), subsets()
    losses = additive(given, kept) + random(3).normal(size=(2, REPLAYS, 3)) * 5
    for query in "ab":  # without its data the query's loss is another story
        gone = ~kept.sel(train=query).values
        losses.loc[{"query": query}] = np.where(gone, -100 * losses.sel(query=query), losses.sel(query=query))
    one = lds(given, losses, kept)
    sets = [[f"{name}:{label}" for label in bare] for name in ("val", "test")]
    again = [
        xr.concat([array.assign_coords(query=names) for names in sets], "query") for array in (given.value, losses)
    ]
    two = lds(xr.Dataset({"value": again[0]}, {"train_size": given.train_size}), again[1], kept)
    for names in sets:
        np.testing.assert_allclose(two.spearman.sel(query=names), one.spearman, rtol=1e-12)
    np.testing.assert_allclose(two.lds, one.lds, rtol=1e-12)


def test_replays_are_paired_by_their_names_where_both_have_names_and_a_missing_one_is_named():
    given, kept = attribution(), subsets().assign_coords(replay=[f"replay {k}" for k in range(REPLAYS)])
    losses = additive(given, kept)
    shuffled = kept.isel(replay=random(5).permutation(REPLAYS))
    np.testing.assert_allclose(lds(given, losses, shuffled).lds, 1, rtol=1e-12)
    np.testing.assert_allclose(lds(given, losses.isel(replay=slice(9, 20)), shuffled).lds, 1, rtol=1e-12)
    unnamed = losses.drop_vars("replay")
    np.testing.assert_allclose(lds(given, unnamed, kept).lds, 1, rtol=1e-12)
    with pytest.raises(ValueError, match=r"kept lacks replay \['replay 3'\] of the losses"):
        lds(given, losses, kept.drop_sel(replay=["replay 3"]))


def test_so_few_replays_that_their_bootstrap_has_no_width_are_refused():
    given, kept = attribution(), subsets(replays=4)
    lds(given, additive(given, kept), kept)
    with pytest.raises(ValueError, match=r"got 3 replays, expected 4 or more.*retrain more subsets"):
        lds(given, additive(given, kept)[:, :3], kept[:3])
