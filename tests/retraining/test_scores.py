import numpy as np
import pytest
import xarray as xr

from stagewise.retraining.scores import agreement, coverage, predicted_effect

LABELS = list("abcdef")


def effects(values, train=LABELS, query=LABELS, steps=None):
    steps = range(len(values)) if steps is None else steps
    coords = {"step": list(steps), "train": train, "query": query}
    return xr.DataArray(np.asarray(values), coords, ("step", "train", "query"))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_a_perfect_prediction_scores_one_with_certainty():
    got = agreement(effects(noise(2, 6, 6)), effects(noise(2, 6, 6)))
    same = agreement(effects(noise(2, 6, 6)), effects(noise(2, 6, 6)))
    xr.testing.assert_identical(got, same)
    for name in got.data_vars:
        np.testing.assert_allclose(got[name], 1, rtol=1e-9)


def test_scores_are_numpys_over_all_and_over_off_diagonal_pairs():
    p, m = noise(3, 6, 6), 0.5 * noise(3, 6, 6) + noise(3, 6, 6, seed=1)
    got = agreement(effects(p), effects(m))
    off = ~np.eye(6, dtype=bool)
    for step in range(3):
        for suffix, chosen in (("", off | True), ("_off_diagonal", off)):
            x, y = p[step][chosen], m[step][chosen]
            correlation, slope = np.corrcoef(x, y)[0, 1], np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
            np.testing.assert_allclose(got[f"correlation{suffix}"][step], correlation, rtol=1e-10)
            np.testing.assert_allclose(got[f"slope{suffix}"][step], slope, rtol=1e-10)


def test_a_large_diagonal_does_not_reach_the_off_diagonal_scores():
    p, m = noise(1, 6, 6), noise(1, 6, 6, seed=1)
    big = 100 * np.eye(6)
    plain, loud = agreement(effects(p), effects(m)), agreement(effects(p + big), effects(m + 3 * big))
    for name in ("correlation_off_diagonal", "slope_off_diagonal"):
        for end in ("", "_lower", "_upper"):
            np.testing.assert_allclose(loud[name + end], plain[name + end], rtol=1e-9)
    assert loud.correlation > 0.99
    assert loud.slope > 2.9


def test_slope_is_measured_over_predicted():
    p = noise(1, 6, 6)
    np.testing.assert_allclose(agreement(effects(p), effects(2 * p)).slope, 2, rtol=1e-10)


def test_labels_not_positions_decide_which_pairs_are_compared():
    p = effects(noise(4, 6, 6), steps=[1, 5, 9, 20])
    shuffled = p.isel(train=[3, 1, 0, 2, 5, 4], query=[5, 4, 3, 2, 1, 0], step=[0, 2]).transpose("query", ...)
    got = agreement(p, shuffled)
    assert got.step.values.tolist() == [1, 9]
    np.testing.assert_allclose(got.correlation_off_diagonal, 1, rtol=1e-10)


def test_without_shared_labels_there_is_no_off_diagonal():
    names = ["query " + label for label in LABELS]
    got = agreement(effects(noise(1, 6, 6), query=names), effects(noise(1, 6, 6), query=names))
    assert not [name for name in got if "off_diagonal" in name]


@pytest.mark.parametrize(
    ("side", "dim", "message"),
    [
        ("predicted", "train", "predicted effects lack train"),
        ("measured", "query", "measured effects lack query"),
    ],
)
def test_labels_that_do_not_match_are_named(side, dim, message):
    arrays = {"predicted": effects(noise(1, 6, 6)), "measured": effects(noise(1, 6, 6))}
    arrays[side] = arrays[side].drop_sel({dim: ["c"]})
    with pytest.raises(ValueError, match=rf"{message} \['c'\]"):
        agreement(**arrays)


def test_a_measured_step_without_prediction_is_named():
    with pytest.raises(ValueError, match=r"predicted effects lack step \[7\]"):
        agreement(effects(noise(1, 6, 6)), effects(noise(2, 6, 6), steps=[0, 7]))


def test_effects_that_are_not_finite_are_refused_with_their_step():
    p = noise(2, 6, 6)
    p[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"steps \[5\] are not all finite"):
        agreement(effects(p, steps=[4, 5]), effects(noise(2, 6, 6), steps=[4, 5]))


def test_effects_that_do_not_vary_have_no_correlation():
    constant = np.full((1, 6, 6), 0.1)
    got = agreement(effects(noise(1, 6, 6)), effects(constant))
    assert np.isnan([got.correlation, got.correlation_lower, got.correlation_upper]).all()
    assert np.isfinite(got.slope)


def test_intervals_cover_the_true_slope_and_correlation_even_when_pairs_share_groups():
    """Effects made of group factors: pairs are not independent, which a bootstrap over pairs would ignore."""
    random, steps, k = np.random.default_rng(3), 400, 12
    labels = list(range(k))

    def factors():
        a, b = random.normal(size=(steps, k, 1)), random.normal(size=(steps, 1, k))
        return a + b + random.normal(size=(steps, k, k))

    p = factors()
    m = 1.3 * p + factors()
    got = agreement(effects(p, labels, labels), effects(m, labels, labels))
    truth = {"slope": 1.3, "correlation": 1.3 / np.sqrt(1.3**2 + 1)}
    for name, value in truth.items():
        covered = ((got[name + "_lower"] <= value) & (value <= got[name + "_upper"])).mean()
        assert 0.90 < covered < 1.0, (name, float(covered))


def influence(**extra):
    value = effects(noise(2, 3, 2), train=list("abc"), query=["x", "y"])
    return xr.Dataset({"value": value, **extra}, {"train_size": ("train", [10, 20, 5])})


def test_the_predicted_effect_scales_with_group_size_and_change_of_weight():
    given = influence()
    got = predicted_effect(given, weight=0.8)
    expected = given.value * np.array([-2.0, -4.0, -1.0])[None, :, None]
    np.testing.assert_allclose(got.effect, expected)
    assert got.effect.dims == ("step", "train", "query")
    assert "effect_stderr" not in got
    assert got.attrs["sign"] == "positive = helpful"


def test_the_predicted_standard_error_is_positive_and_scales_alike():
    given = influence(stderr=abs(influence().value))
    got = predicted_effect(given, weight=0.8)
    np.testing.assert_allclose(got.effect_stderr, abs(got.effect))


def test_an_influence_without_group_sizes_is_refused():
    with pytest.raises(ValueError, match="coordinate 'train_size'"):
        predicted_effect(influence().drop_vars("train_size"), 0.8)


def test_pairs_of_a_group_with_itself_are_set_apart_in_each_of_several_query_sets():
    p, m = noise(1, 6, 6), noise(1, 6, 6, seed=1)
    one = agreement(effects(p), effects(m))
    names = [f"{name}:{label}" for name in ("val", "test") for label in LABELS]
    twice = agreement(*(effects(np.tile(values, 2), query=names) for values in (p, m)))
    for score in ("correlation", "slope", "correlation_off_diagonal", "slope_off_diagonal"):
        np.testing.assert_allclose(twice[score], one[score], rtol=1e-10)
    assert twice["slope_off_diagonal"].attrs["pairs"] == 60


def test_number_labels_of_groups_are_the_same_as_their_text():
    labels = list(range(6))
    got = agreement(effects(noise(1, 6, 6), labels), effects(noise(1, 6, 6), labels))
    assert "slope_off_diagonal" not in got
    text = [str(label) for label in labels]
    got = agreement(effects(noise(1, 6, 6), labels, text), effects(noise(1, 6, 6), labels, text))
    assert got["slope_off_diagonal"].attrs["pairs"] == 30


def test_coverage_is_the_share_of_effects_within_both_errors_whatever_the_order_of_labels():
    dims, coords = ("step", "train", "query"), {"step": [3, 9], "train": list("ab"), "query": list("xy")}
    predicted = xr.Dataset(
        {"effect": (dims, np.zeros((2, 2, 2))), "effect_stderr": (dims, np.full((2, 2, 2), 0.3))}, coords
    )
    effect = np.array([[[0.9, 1.0], [-0.9, -1.0]], [[0.0, 0.0], [0.0, 3.0]]])  # 1.96 * hypot(.3, .4) = .98
    measured = xr.Dataset({"effect": (dims, effect), "effect_stderr": (dims, np.full((2, 2, 2), 0.4))}, coords)
    shuffled = predicted.isel(train=[1, 0], query=[1, 0])
    np.testing.assert_allclose(coverage(shuffled, measured), [0.5, 0.75])
    exact = coverage(predicted.drop_vars("effect_stderr"), measured)  # now 1.96 * .4 = .784
    np.testing.assert_allclose(exact, [0.0, 0.75])
