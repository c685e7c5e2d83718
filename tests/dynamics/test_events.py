import numpy as np
import pytest
import xarray as xr
from scipy import stats

from stagewise.dynamics import curves, events, table

STEPS = np.unique(np.concatenate([[0], np.geomspace(1, 10_000, 15).round()]).astype(int))
TIME = np.log1p(STEPS)


def exact(value, steps=STEPS) -> xr.Dataset:
    """A deterministic influence of values (step,) or (step, curve)."""
    value = np.array(value, dtype=float).reshape(len(steps), -1, 1)
    dims = ("step", "train", "query")
    return xr.Dataset(
        {"value": (dims, value), "stderr": (dims, 0 * value)},
        coords={
            "step": list(steps),
            "train": [f"train {i}" for i in range(value.shape[1])],
            "query": ["query"],
        },
    )


def noisy(truth, replicates: int, rng: np.random.Generator, shared: float = 0.0) -> xr.Dataset:
    """Curves (step, curve) plus noise of stderr 1; a fraction of its variance is common to all steps."""
    dataset = exact(truth)
    steps, trains = dataset.sizes["step"], dataset.sizes["train"]
    own = rng.normal(size=(steps, replicates, trains, 1))
    common = rng.normal(size=(1, replicates, trains, 1))
    noise = np.sqrt(1 - shared) * own + np.sqrt(shared) * common
    parts = dataset.value.values[:, None] + np.sqrt(replicates) * noise
    dataset["value"].values[:] = parts.mean(1)
    dataset["stderr"].values[:] = parts.std(1, ddof=1) / np.sqrt(replicates)
    return dataset.assign(replicates=(("step", "replicate", "train", "query"), parts))


def of(found, kind):
    return [event for event in found if event.kind == kind]


# -- Was there an event?


@pytest.mark.parametrize("replicates", [2, 4, 16])
def test_pure_noise_yields_no_event_more_often_than_promised(replicates):
    rng = np.random.default_rng(replicates)
    any_event = [bool(events(noisy(np.zeros((len(STEPS), 5)), replicates, rng), level=0.9)) for _ in range(200)]
    # Bonferroni is nearly exact for independent noise: too many would be a lie, none at all a blunt test.
    assert stats.binomtest(sum(any_event), 200, 0.1, alternative="greater").pvalue > 1e-3
    assert np.mean(any_event) > 0.02


def test_curves_that_touch_zero_without_crossing_do_not_flip():
    rng = np.random.default_rng(0)
    touching = 20 * np.abs(np.tanh(TIME - TIME[[4, 7, 10]][:, None])).T
    touching[6:10, 1] = 0.0
    flips = [bool(of(events(noisy(touching, 8, rng), level=0.9), "flip")) for _ in range(100)]
    assert stats.binomtest(sum(flips), 100, 0.1, alternative="greater").pvalue > 1e-3
    assert not of(events(exact(touching)), "flip")


@pytest.mark.parametrize(("replicates", "shared"), [(8, 0.0), (8, 0.8), (64, 0.0)])
def test_clear_flips_are_all_found_once_and_with_their_sign(replicates, shared):
    truth = 30 * np.tanh(np.array([[1.0], [-1.0]]) * (TIME - 5)).T
    found = events(noisy(truth, replicates, np.random.default_rng(1), shared))
    assert [(e.train, e.detail["sign"]) for e in of(found, "flip")] == [("train 0", 1.0), ("train 1", -1.0)]
    assert [e.train for e in of(found, "onset")] == ["train 0", "train 1"]


def test_the_same_curve_must_be_clearer_among_many_than_alone():
    value = exact(np.where(TIME < 5, -1.0, 1.0)[:, None] * np.ones(500))
    doubtful = value.assign(stderr=value.stderr + 0.3)
    assert of(events(doubtful.isel(train=[0])), "flip")
    assert not events(doubtful)


# -- When was it?


def covers(truth, when, kind, replicates, shared, rng):
    """How often the interval of the event at time ``when`` covers, over curves judged one by one."""
    data = noisy(truth, replicates, rng, shared)
    hits = []
    for i in range(truth.shape[1]):
        found = of(events(data.isel(train=[i])), kind)
        hits += [np.log1p(e.lower) <= when[i] <= np.log1p(e.upper) for e in found]
    assert len(hits) > 60
    return np.mean(hits)


CASES = [(4, 0.0, 15), (8, 0.8, 8), (32, 0.0, 5), (32, 0.8, 20)]


@pytest.mark.parametrize(("replicates", "shared", "height"), CASES)
def test_flip_interval_covers_the_true_crossing(replicates, shared, height):
    rng = np.random.default_rng(2)
    when = rng.uniform(3, 6, size=120)
    truth = height * np.tanh(TIME[:, None] - when)
    assert covers(truth, when, "flip", replicates, shared, rng) >= 0.95


@pytest.mark.parametrize(("replicates", "shared", "height"), CASES)
def test_peak_interval_covers_the_true_peak(replicates, shared, height):
    rng = np.random.default_rng(3)
    when = rng.uniform(3, 6, size=120)
    truth = -height * np.exp(-(np.abs(TIME[:, None] - when) ** 2))
    assert covers(truth, when, "helpful peak", replicates, shared, rng) >= 0.95


@pytest.mark.parametrize(("replicates", "shared", "height"), CASES)
def test_onset_interval_covers_the_true_rise_through_a_tenth_of_the_peak(replicates, shared, height):
    rng = np.random.default_rng(4)
    peak = rng.uniform(4, 6, size=120)
    truth = height * np.exp(-(np.abs(TIME[:, None] - peak) ** 2))
    assert covers(truth, peak - np.sqrt(np.log(10)), "onset", replicates, shared, rng) >= 0.95


def test_peak_interval_holds_the_steps_a_paired_t_test_cannot_tell_from_the_peak():
    truth = 12 * np.exp(-((TIME - 5) ** 2) / 4)
    data = noisy(truth[:, None], 8, np.random.default_rng(5), shared=0.5)
    parts = data.replicates.values[:, :, 0, 0]
    top = parts.mean(1).argmax()
    like = [k == top or stats.ttest_rel(parts[k], parts[top]).pvalue >= 0.05 for k in range(len(STEPS))]
    first, last = np.flatnonzero(like)[[0, -1]]
    (peak,) = of(events(data), "harmful peak")
    assert (peak.step, peak.lower, peak.upper) == (STEPS[top], STEPS[first - 1], STEPS[last + 1])
    assert (peak.detail["value"], peak.detail["stderr"]) == (data.value[top].item(), data.stderr[top].item())
    assert not peak.detail["at_edge"]


def test_shared_random_numbers_narrow_the_peak_interval():
    truth = 20 * np.exp(-((TIME - 5) ** 2) / 8)[:, None] * np.ones(50)
    widths = [
        np.mean([np.log1p(e.upper) - np.log1p(e.lower) for e in of(events(data), "harmful peak")])
        for data in (noisy(truth, 16, np.random.default_rng(6), shared) for shared in (0.0, 0.95))
    ]
    assert widths[1] < 0.7 * widths[0]


# -- Deterministic curves: the doubt is the grid.


def test_crossing_is_interpolated_in_log_of_step_and_doubted_by_one_cell():
    (flip,) = of(events(exact(4.2 - TIME)), "flip")
    before = STEPS[TIME < 4.2].max()
    assert flip.step == pytest.approx(np.expm1(4.2), rel=1e-12)
    assert (flip.lower, flip.upper) == (before, STEPS[list(STEPS).index(before) + 1])
    assert flip.detail == {"sign": -1.0}


def test_a_curve_that_rests_at_zero_flips_when_it_leaves():
    steps = [0, 1, 2, 5, 10]
    (flip,) = of(events(exact([-1, 0, 0, 0, 2], steps)), "flip")
    assert (flip.step, flip.lower, flip.upper) == (pytest.approx(5), 0, 10)


def test_every_crossing_is_a_flip_and_each_sign_has_its_peak():
    steps = [0, 1, 2, 5, 10, 20, 50]
    found = events(exact([0, -1, -3, 2, 4, 0, -1], steps))
    assert [(e.lower, e.upper, e.detail["sign"]) for e in of(found, "flip")] == [(2, 5, 1), (10, 50, -1)]
    (helpful,), (harmful,) = of(found, "helpful peak"), of(found, "harmful peak")
    assert (helpful.step, helpful.lower, helpful.upper, helpful.detail["value"]) == (2, 1, 5, -3)
    assert (harmful.step, harmful.lower, harmful.upper, harmful.detail["value"]) == (10, 5, 20, 4)


def test_onset_is_the_last_rise_on_the_way_to_the_largest_peak():
    steps = np.expm1(np.arange(7.0))
    (onset,) = of(events(exact([0, 5, 0, 0.5, 10, 0, 4], steps)), "onset")
    # A tenth of the peak is 1: passed between 0.5 and 10, at 0.5 / 9.5 of the way.
    assert np.log1p(onset.step) == pytest.approx(3 + 0.5 / 9.5)
    assert (onset.lower, onset.upper) == (steps[3], steps[4])
    assert onset.detail == {"sign": 1.0, "at_edge": False}


def test_an_influence_there_from_the_start_has_its_onset_at_the_edge():
    (onset,) = of(events(exact(-np.ones(len(STEPS)))), "onset")
    assert (onset.step, onset.lower, onset.upper, onset.detail["at_edge"]) == (0, 0, 0, True)


def test_what_is_largest_at_the_edge_is_not_passed_off_as_a_peak():
    falling, rising = of(events(exact(np.stack([10 - TIME, 1 + TIME], axis=1))), "harmful peak")
    assert (falling.step, falling.detail["at_edge"]) == (0, True)
    assert (rising.step, rising.detail["at_edge"]) == (STEPS[-1], True)
    inside = of(events(exact(np.minimum(TIME, 5) - 0.1 * TIME)), "harmful peak")
    assert not inside[0].detail["at_edge"]


def test_the_highest_point_of_a_noisy_plateau_is_not_passed_off_as_a_peak():
    plateau = 30 * np.ones((len(STEPS), 20)) * (TIME > 3)[:, None]
    peaks = of(events(noisy(plateau, 16, np.random.default_rng(7))), "harmful peak")
    inside = [STEPS[0] < e.step < STEPS[-1] for e in peaks]
    assert len(peaks) == 20
    assert np.mean(inside) > 0.5
    assert np.mean([e.detail["at_edge"] for e in peaks]) >= 0.9


# -- What must not matter, and what must.


def test_order_of_pairs_and_dimensions_changes_nothing():
    truth = 10 * np.sin(TIME[:, None] - np.linspace(0, 3, 6))
    data = noisy(truth, 8, np.random.default_rng(8))
    shuffled = data.isel(train=[3, 1, 5, 0, 2, 4]).transpose("query", "train", ...)
    found, again = events(data), events(shuffled)
    assert len(found) > 12
    assert sorted(map(str, found)) == sorted(map(str, again))
    assert found == events(curves(data))


def test_a_missing_checkpoint_widens_the_interval_to_its_neighbours():
    value = exact(TIME - 4.2)
    before = int(np.flatnonzero(TIME < 4.2)[-1])
    kept = [k for k in range(len(STEPS)) if k != before]
    (flip,) = of(events(value.isel(step=kept)), "flip")
    assert (flip.lower, flip.upper) == (STEPS[before - 1], STEPS[before + 1])
    assert flip.step == pytest.approx(np.expm1(4.2))


def test_one_checkpoint_has_no_flip_and_its_peak_is_all_edge():
    peak, onset = events(exact([-2.0], steps=[7]))
    assert (peak.kind, peak.step, peak.lower, peak.upper) == ("helpful peak", 7, 7, 7)
    assert peak.detail["at_edge"]
    assert onset.detail["at_edge"]


def test_an_untrusted_large_value_does_not_become_the_peak():
    value = exact([1, 3, 9, 1], steps=[0, 1, 2, 3])
    value["stderr"].values[:, 0, 0] = [0.1, 0.1, 8.0, 0.1]
    (peak,) = of(events(value), "harmful peak")
    # It may yet be the larger one, so the interval reaches past it.
    assert (peak.step, peak.upper) == (1, 3)


def test_zero_influence_is_eventless_and_its_table_empty():
    assert events(exact(np.zeros(len(STEPS)))) == []
    assert table([]).sizes["event"] == 0


def test_table_holds_every_event_and_prints():
    found = events(exact(np.stack([4.2 - TIME, 1 + TIME], axis=1)))
    columns = table(found)
    assert columns.step.values.tolist() == [e.step for e in found]
    assert columns.train.values.tolist() == [e.train for e in found]
    assert np.isnan(columns.value[columns.kind == "flip"]).all()
    assert columns.at_edge.dtype == bool
    assert "helpful peak" in columns.to_dataframe().to_string()
