import numpy as np
import pytest
from scipy import stats

from stagewise.dynamics.alignment import alignment
from stagewise.dynamics.events import Event
from stagewise.dynamics.stages import Transition

SPAN = (0, np.expm1(10.0))


def event(time, train="dog", kind="flip"):
    """At a time log(1 + step), known to 0.1."""
    edges = np.expm1([time, time - 0.1, time + 0.1])
    return Event(kind, train, "cat", *edges.tolist(), {"sign": 1.0})


def transition(time, name):
    """At a time log(1 + step), with a band of 0.5."""
    edges = np.expm1([time, time - 0.5, time + 0.5])
    return Transition(name, "rise", *edges.tolist(), {})


BRANCHES = [transition(time, name) for time, name in ((2.0, "root"), (4.1, "kingdom"), (7.7, "class"))]


def test_distances_go_to_the_nearest_transition_in_log_time_and_events_before_it_are_negative():
    got = alignment([event(1.8), event(5.0), event(7.7)], BRANCHES, span=SPAN, draws=99)
    assert got["transition"].values.tolist() == ["root", "kingdom", "class"]
    np.testing.assert_allclose(got["distance"], [-0.2, 0.9, 0], atol=1e-12)
    np.testing.assert_allclose(got["distance_lower"], [-0.3, 0.8, -0.1], atol=1e-12)
    np.testing.assert_allclose(got["distance_upper"], [-0.1, 1.0, 0.1], atol=1e-12)
    np.testing.assert_allclose(got["transition_step"], np.expm1([2.0, 4.1, 7.7]))
    assert got["inside"].values.tolist() == [True, False, True]
    assert got.attrs["statistic"] == pytest.approx(1.1 / 3)


def test_match_decides_the_transition_and_leaves_events_out():
    names = {"dog": "class", "cat": None, "oak": "root"}
    found = [event(2.0, "dog"), event(3.0, "cat"), event(4.0, "oak")]
    got = alignment(found, BRANCHES, span=SPAN, match=lambda e: names[e.train], draws=99)
    assert got["train"].values.tolist() == ["dog", "oak"]
    np.testing.assert_allclose(got["distance"], [-5.7, 2.0], atol=1e-12)
    assert got.attrs["statistic"] == pytest.approx(7.7 / 2)


def test_linear_axis_measures_and_shifts_steps():
    middle = Transition("middle", "rise", 50.0, 40.0, 60.0, {})
    got = alignment(
        [Event("flip", "dog", "cat", 45.0, 44.0, 46.0, {})], [middle], span=(0, 100), axis=np.asarray, draws=2000
    )
    assert got["distance"].item() == -5
    assert got.attrs["null_median"] == pytest.approx(25, abs=2)
    assert got.attrs["p_value"] == pytest.approx(0.1, abs=0.03)


def test_aligned_events_have_a_small_p_and_rotated_ones_do_not():
    aligned = [event(np.log1p(t.step) + 0.05) for t in BRANCHES]
    rotated = [event((np.log1p(e.step) + 1.2) % 10) for e in aligned]
    close = alignment(aligned, BRANCHES, span=SPAN, draws=999)
    far = alignment(rotated, BRANCHES, span=SPAN, draws=999)
    assert close.attrs["p_value"] < 0.03 < 0.3 < far.attrs["p_value"]
    assert close.attrs["statistic"] == pytest.approx(0.05)
    assert close.attrs["null_median"] > 0.5
    p = close.attrs["p_value"]
    assert close.attrs["p_value_stderr"] == pytest.approx(np.sqrt(p * (1 - p) / 1000))


@pytest.mark.parametrize(
    "axis",
    [
        np.zeros_like,
        np.negative,
        np.log,
        lambda t: np.minimum(t, 100.0),
        lambda t: np.full_like(t, np.nan),
        lambda _: 0,
    ],
)
def test_an_axis_on_which_time_does_not_pass_is_refused_and_not_given_a_tiny_p(axis):
    with pytest.raises(ValueError, match=r"axis must be finite and strictly increasing on the span \(0, "):
        alignment([event(5.5)], BRANCHES, span=SPAN, axis=axis, draws=99)


def test_one_event_of_exact_odds_has_that_p():
    # Within 0.5 of the only transition at 5: a tenth of the circle of 10.
    got = alignment([event(5.5)], [transition(5.0, "only")], span=SPAN)
    assert got.attrs["p_value"] == pytest.approx(0.1, abs=0.012)
    assert got.attrs["null_median"] == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("match", [None, lambda e: e.train])
def test_patterns_at_a_random_time_have_uniform_p_values_however_they_cluster(match):
    rng, names = np.random.default_rng(0), ["root", "kingdom", "class"]
    pattern = np.array([0, 0.01, 0.02, 2.1, 2.2, 5.7])  # as related pairs make it: far fewer witnesses than events
    p_values = []
    for seed in range(200):
        times = (pattern + rng.uniform(0, 10)) % 10
        found = [event(time, names[k // 2]) for k, time in enumerate(times)]
        p_values.append(alignment(found, BRANCHES, span=SPAN, match=match, draws=99, seed=seed).attrs["p_value"])
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert stats.binomtest(sum(p <= 0.1 for p in p_values), 200, 0.1).pvalue > 1e-3


def test_copies_of_one_event_are_one_witness():
    one = alignment([event(2.1)], BRANCHES, span=SPAN, draws=999)
    many = alignment([event(2.1)] * 50, BRANCHES, span=SPAN, draws=999)
    assert many.attrs["p_value"] == one.attrs["p_value"]


def test_seed_decides_the_p_value_and_the_table_prints():
    results = [alignment([event(3.0)], BRANCHES, span=SPAN, draws=99, seed=seed) for seed in (1, 1, 2)]
    assert results[0].attrs == results[1].attrs
    assert results[0].attrs["null_median"] != results[2].attrs["null_median"]
    assert "root" in results[0].to_dataframe().to_string()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"match": lambda _: "phylum"}, r"match names \['phylum'\], but the transitions are \['root', 'kingdom'"),
        ({"match": lambda _: None}, "no event to align: got 1 events, and match leaves out all"),
        ({"events": []}, "no event to align: got 0 events"),
        ({"transitions": []}, "no transition to align events with"),
        ({"transitions": [BRANCHES[0], BRANCHES[0]]}, "2 transitions are called 'root'"),
        ({"span": (0, 100)}, "lie outside the span"),
        ({"span": (5, 5)}, "first < last"),
    ],
)
def test_what_cannot_be_aligned_is_refused_with_the_reason(change, message):
    arguments = {"events": [event(3.0)], "transitions": BRANCHES, "span": SPAN, "draws": 9} | change
    with pytest.raises(ValueError, match=message):
        alignment(**arguments)
