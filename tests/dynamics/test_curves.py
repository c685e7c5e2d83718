import numpy as np
import pytest
import xarray as xr
from scipy import stats

from stagewise.dynamics import curves, pair


def influence(replicates: np.ndarray, steps=(0, 1, 10)) -> xr.Dataset:
    """A sampled influence of (step, replicate, train, query) replicates."""
    dims = ("step", "train", "query")
    mean, stderr = replicates.mean(1), replicates.std(1, ddof=1) / np.sqrt(replicates.shape[1])
    return xr.Dataset(
        {
            "value": (dims, mean, {"unit": "nats per unit weight"}),
            "stderr": (dims, stderr),
            "replicates": (("step", "replicate", "train", "query"), replicates),
        },
        coords={"step": list(steps), "train": ["dog", "oak"], "query": ["cat", "rose"]},
        attrs={"sign": "negative = helpful", "omitted": "{}"},
    )


@pytest.fixture
def sampled() -> xr.Dataset:
    return influence(np.random.default_rng(0).normal(size=(3, 4, 2, 2)))


def test_band_of_replicates_is_the_t_interval(sampled):
    parts = sampled.replicates.transpose("replicate", ...)
    expected = stats.ttest_1samp(parts, 0.0).confidence_interval(0.9)
    banded = curves(sampled, level=0.9)
    np.testing.assert_allclose(banded.lower, expected.low, rtol=1e-12)
    np.testing.assert_allclose(banded.upper, expected.high, rtol=1e-12)


def test_band_without_replicates_is_normal(sampled):
    banded = curves(sampled.drop_vars("replicates"), level=0.95)
    np.testing.assert_allclose(banded.upper - banded.value, 1.959964 * sampled.stderr, rtol=1e-6)


def test_an_error_over_four_batch_orders_knows_that_they_are_four(sampled):
    four = sampled.drop_vars("replicates").assign_attrs(repeats=4)
    np.testing.assert_allclose(curves(four).upper, curves(sampled).upper, rtol=1e-12)
    one = four.assign_attrs(repeats=1)  # the run's own: no order was drawn
    np.testing.assert_allclose(curves(one).upper - one.value, 1.959964 * one.stderr, rtol=1e-6)


def test_nothing_of_the_influence_is_lost(sampled):
    banded = curves(sampled)
    xr.testing.assert_identical(banded.drop_vars(["lower", "upper"]), sampled)
    assert banded.lower.attrs == {"unit": "nats per unit weight", "level": 0.95}


def test_pair_is_chosen_by_label_not_by_position(sampled):
    one = pair(curves(sampled), "oak", "cat")
    assert one.value.dims == ("step",)
    np.testing.assert_array_equal(one.upper, curves(sampled).upper[:, 1, 0])
    with pytest.raises(ValueError, match="no query 'fern' among"):
        pair(sampled, "oak", "fern")


def test_pair_works_on_sample_numbers_without_coordinates(sampled):
    numbered = sampled.drop_vars(["train", "query"])
    np.testing.assert_array_equal(pair(numbered, 1, 0).value, sampled.value[:, 1, 0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.assign(value=d.value.where(d.step != 10)), r"'value' is not finite at steps \[10\]"),
        (lambda d: d.assign(replicates=d.replicates.where(d.step > 0)), r"not finite at steps \[0\]"),
        (lambda d: d.isel(replicate=[0]), "two or more"),
        (lambda d: d.isel(step=[1, 0, 2]), "ascend"),
        (lambda d: d.isel(step=[0, 0, 1]), "ascend"),
        (lambda d: d.isel(step=[]), "ascend"),
        (lambda d: d.assign_coords(step=[-1, 0, 1]), "ascend"),
        (lambda d: d.drop_vars("stderr"), "must hold 'stderr'"),
        (
            lambda d: d.isel(query=0),
            "'value' must have dims|'stderr' must have dims|'replicates' must have dims",
        ),
        (lambda d: d.assign(stderr=-d.stderr), "must not be negative"),
    ],
)
def test_malformed_influence_is_refused_with_the_reason(sampled, spoil, message):
    with pytest.raises(ValueError, match=message):
        curves(spoil(sampled))


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_level_in_percent_is_refused(sampled, level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        curves(sampled, level)
