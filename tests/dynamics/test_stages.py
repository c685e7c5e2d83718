import numpy as np
import pytest
import xarray as xr
from scipy import stats

from stagewise.dynamics.stages import Transition, extrema, rise, transition_table

STEPS = np.unique(np.concatenate([[0], np.geomspace(1, 10_000, 15).round()]).astype(int))
TIME = np.log1p(STEPS)


def points(values, steps=None):
    return xr.DataArray(np.array(values, float), {"step": range(len(values)) if steps is None else steps}, ["step"])


def noisy(truth, rng, replicates=16, shared=0.0):
    """A curve plus noise of stderr 1; a fraction of its variance is common to all steps."""
    own = rng.normal(size=(len(truth), replicates))
    noise = np.sqrt(1 - shared) * own + np.sqrt(shared) * rng.normal(size=replicates)
    parts = np.array(truth)[:, None] + np.sqrt(replicates) * noise
    return xr.Dataset(
        {
            "value": ("step", parts.mean(1)),
            "stderr": ("step", parts.std(1, ddof=1) / np.sqrt(replicates)),
            "replicates": (("step", "replicate"), parts),
        },
        {"step": STEPS[: len(truth)]},
    )


def exact(values):
    value = np.array(values, float)
    return xr.Dataset({"value": ("step", value), "stderr": ("step", 0 * value)}, {"step": STEPS[: len(value)]})


# -- Rises


def test_logistic_rise_has_its_closed_form_crossings():
    steps = np.linspace(0, 40, 4001)
    found = rise(points(3 / (1 + np.exp(-(steps - 20) / 2)), steps), "root")
    closed = [20 + 2 * np.log(f / (1 - f)) for f in (0.05, 0.1, 0.2, 0.5)]
    assert [found.lower, found.step, found.upper, found.detail["half"]] == pytest.approx(closed, abs=1e-3)
    assert (found.name, found.kind) == ("root", "rise")
    assert found.detail["final"] == pytest.approx(3, rel=1e-3)
    assert found.detail["spacing"] == pytest.approx(0.01)


def test_crossings_are_linear_between_checkpoints_and_the_first_of_several():
    found = rise(points([0, 0, 4, 1, 10], [0, 10, 14, 20, 30]), "late", fraction=0.2, band=(0.1, 0.25))
    assert (found.lower, found.step, found.upper) == (11, 12, 12.5)
    assert found.detail == {"half": pytest.approx(20 + 10 * 4 / 9), "final": 10, "spacing": 4}


def test_a_crossing_on_a_checkpoint_is_that_checkpoint():
    found = rise(points([0, 1, 10]), "exact")
    assert (found.step, found.detail["spacing"]) == (1, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 0, 0], "'x' does not rise: it starts at 0 and ends at 0"),
        ([0, 5, -1], "ends at -1, but should start below 0.05 of a positive final value"),
        ([1, 2, 4], "subtract its first value"),
        ([0, np.nan, 1], "must be finite"),
        ([1], "two steps or more"),
    ],
)
def test_a_curve_that_does_not_rise_is_refused_with_the_reason(values, message):
    with pytest.raises(ValueError, match=message):
        rise(points(values), "x")


def test_malformed_rises_are_refused():
    with pytest.raises(ValueError, match="ascend"):
        rise(points([0, 1, 2], [0, 2, 1]), "x")
    with pytest.raises(ValueError, match=r"got \{'item': 2, 'step': 2\}"):
        rise(xr.DataArray(np.eye(2), dims=("item", "step")), "x")
    with pytest.raises(ValueError, match="got fraction=10"):
        rise(points([0, 1, 2]), "x", fraction=10)


# -- Extrema


@pytest.mark.parametrize("replicates", [3, 16])
@pytest.mark.parametrize("plateau", [0.0, 60.0])
def test_noise_is_not_called_a_turn_more_often_than_promised_be_it_flat_or_on_a_plateau(replicates, plateau):
    rng = np.random.default_rng(replicates)
    truth = plateau * (TIME > 3)
    false = [bool(extrema(noisy(truth, rng, replicates), level=0.8)) for _ in range(100)]
    assert stats.binomtest(sum(false), 100, 0.2, alternative="greater").pvalue > 1e-3


def test_noise_without_replicates_is_not_called_a_turn_more_often_than_promised():
    rng = np.random.default_rng(0)
    ones = exact(np.zeros(len(STEPS))).assign(stderr=("step", np.ones(len(STEPS))))
    false = [bool(extrema(ones.assign(value=("step", rng.normal(size=len(STEPS)))), level=0.8)) for _ in range(100)]
    assert stats.binomtest(sum(false), 100, 0.2, alternative="greater").pvalue > 1e-3


def test_clear_stages_are_all_found_in_turn_and_numbered():
    waves = 40 * np.sin(2 * np.pi * TIME / TIME[-1] * 1.5)
    found = extrema(noisy(waves, np.random.default_rng(1)))
    assert [t.name for t in found] == ["maximum 1", "minimum 1", "maximum 2"]
    assert [t.kind for t in found] == ["maximum", "minimum", "maximum"]
    for t, when in zip(found, np.array([1, 3, 5]) / 6 * TIME[-1], strict=True):
        assert np.log1p(t.lower) <= when <= np.log1p(t.upper)
        assert np.abs(t.detail["value"]) == pytest.approx(40, abs=5)


def test_exact_curve_turns_on_its_checkpoints_with_the_neighbours_as_doubt():
    found = extrema(exact([1, 2, 5, 4, 3, 6, 6.5, 0]))
    expected = [("maximum 1", 2, 5.0), ("minimum 1", 4, 3.0), ("maximum 2", 6, 6.5)]
    assert [(t.name, t.step, t.lower, t.upper, t.detail) for t in found] == [
        (name, STEPS[k], STEPS[k - 1], STEPS[k + 1], {"value": v, "stderr": 0.0}) for name, k, v in expected
    ]


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1], [2, 5], [3]])
def test_a_curve_that_never_turns_has_no_stages(values):
    assert extrema(exact(values)) == []


@pytest.mark.parametrize(("height", "shared"), [(12, 0.0), (30, 0.0), (12, 0.9)])
def test_interval_covers_the_true_turn(height, shared):
    rng, hits = np.random.default_rng(2), []
    for when in rng.uniform(3, 6, size=80):
        found = extrema(noisy(height * np.exp(-((TIME - when) ** 2) / 2), rng, 16, shared), level=0.9)
        hits += [np.log1p(t.lower) <= when <= np.log1p(t.upper) for t in found if t.kind == "maximum"]
    assert len(hits) > 70
    assert np.mean(hits) >= 0.9


def test_shared_random_numbers_reveal_turns_that_independent_ones_hide():
    truth = 3 * np.exp(-((TIME - 5) ** 2))
    shared = noisy(truth, np.random.default_rng(3), shared=0.99)
    assert [t.name for t in extrema(shared)] == ["maximum 1"]
    assert extrema(shared.drop_vars("replicates")) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.drop_vars("stderr"), "'stderr' must have dims .*, got nothing"),
        (lambda d: d.expand_dims(query=2), "choose one curve"),
        (lambda d: d.assign(value=d.value.where(d.step > 0)), r"not finite at steps \[0\]"),
        (lambda d: d.isel(step=[1, 0]), "ascend"),
    ],
)
def test_malformed_curves_are_refused_with_the_reason(spoil, message):
    with pytest.raises(ValueError, match=message):
        extrema(spoil(exact([1, 2, 1])))


def test_table_holds_every_transition_and_prints():
    columns = transition_table([*extrema(exact([1, 2, 1])), rise(points([0, 1, 10]), "root")])
    assert columns["name"].values.tolist() == ["maximum 1", "root"]
    assert columns["half"].isnull().values.tolist() == [True, False]
    assert "maximum 1" in columns.to_dataframe().to_string()
    assert transition_table([]).sizes["transition"] == 0


def test_transitions_cannot_be_changed():
    with pytest.raises(AttributeError):
        Transition("a", "rise", 1.0, 0.0, 2.0, {}).step = 3.0
