from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from stagewise.results import headline, others


def test_omitted_checkpoints_are_those_of_the_estimator_and_those_without_influence(results):
    fewer = replace(results, influence=results.influence.isel(step=slice(1, None)))
    assert list(results.omitted) == [0, 5, 10, 400]
    assert results.omitted[400].startswith("not converged: chains disagree")
    assert list(fewer.omitted) == [0, 5, 10, 20, 400]
    assert fewer.omitted[20].startswith("beyond first order: ")


def test_trusted_is_true_exactly_where_there_is_influence(results):
    trusted = results.trusted
    np.testing.assert_array_equal(trusted["step"][trusted], results.influence["step"])
    np.testing.assert_array_equal(trusted["step"], results.diagnostics["step"])


def test_a_run_without_any_answer_trusts_nothing(results):
    nothing = replace(results, influence=None, correlation=None)
    assert not nothing.trusted.any()
    assert len(nothing.omitted) == 14
    assert nothing.predicted is None
    assert list(nothing.agreements) == ["gradient product (Adam)"]


def test_predictions_are_made_only_where_they_were_measured(results):
    some = replace(results, measured=results.measured.sel(step=[5, 45, 400]))
    assert some.predicted["step"].values.tolist() == [45]
    change = 140 * (0.8 - 1)
    np.testing.assert_allclose(some.predicted["effect"], some.influence["value"].sel(step=[45]) * change)
    never = replace(results, measured=results.measured.sel(step=[5]), baselines={})
    assert never.predicted is None
    assert never.agreements == {}


def test_each_estimator_is_scored_where_it_has_values(results):
    assert list(results.agreements) == ["BIF", "gradient product (Adam)"]
    steps = [scores.sizes["step"] for scores in results.agreements.values()]
    assert steps == [10, 14]


def test_pairs_of_a_group_with_itself_are_set_apart_unless_there_are_no_others(results):
    matrix = results.influence
    np.testing.assert_array_equal(others(matrix), ~np.eye(10, dtype=bool))
    assert others(matrix.isel(train=[3], query=[3])).all()
    assert others(matrix.assign_coords(query=[f"digit {k}" for k in range(10)])).all()
    assert headline(results.agreements["BIF"], "slope") == "slope_off_diagonal"


def test_a_group_is_itself_in_each_of_several_query_sets_and_not_an_other_one(results):
    matrix = results.influence
    sets = [matrix.assign_coords(query=[f"{name}:{k}" for k in range(10)]) for name in ("val", "test")]
    both = xr.concat(sets, "query", join="outer", coords="minimal", compat="override")
    np.testing.assert_array_equal(others(both), np.tile(~np.eye(10, dtype=bool), 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": lambda r: r.losses.drop_vars("train")}, "losses must hold 'train'"),
        ({"diagnostics": lambda r: r.diagnostics.drop_vars("advice")}, "diagnostics must hold 'advice'"),
        ({"influence": lambda r: r.influence.isel(step=0)}, "influence must hold 'value'"),
        ({"baselines": lambda r: {"tracin": r.losses}}, "tracin must hold 'value'"),
        ({"measured": lambda r: r.measured.drop_attrs()}, "'weight' and 'window'"),
    ],
)
def test_data_of_the_wrong_shape_are_refused_by_name(results, change, message):
    with pytest.raises(ValueError, match=message):
        replace(results, **{name: value(results) for name, value in change.items()})


def test_damped_influence_stands_in_only_where_chains_cannot_be_trusted(results):
    damped = results.baselines["gradient product (Adam)"]
    with_it = replace(results, baselines={"damped influence": damped})
    assert with_it.stand_in["step"].values.tolist() == [0, 5, 10, 400]
    assert replace(with_it, influence=None, correlation=None).stand_in.sizes["step"] == 14
    assert results.stand_in is None
    part = {"damped influence": damped.sel(step=[10, 20, 900])}
    assert replace(results, baselines=part).stand_in["step"].values.tolist() == [10]
    assert replace(results, baselines={"damped influence": damped.sel(step=[20])}).stand_in is None


def test_exact_influence_is_the_answer_wherever_there_is_one_and_all_others_are_held_against_it(results, exact):
    assert exact.answered is exact.exact
    assert list(exact.estimators) == ["exact influence", "BIF", "gradient product (Adam)"]
    assert exact.predicted.sizes["step"] == 14
    assert exact.stand_in is None
    assert exact.trusted.equals(results.trusted)
    assert list(exact.size_checks) == ["BIF", "gradient product (Adam)"]
    check = exact.size_checks["BIF"]
    assert check["step"].values.tolist() == results.influence["step"].values.tolist()
    np.testing.assert_allclose(check["correlation_off_diagonal"], 1)
    np.testing.assert_allclose(check["slope_off_diagonal"], 1.25)
    assert results.size_checks == {}


def test_coverage_is_of_the_intervals_of_the_chains_also_beside_exact_influence(results, exact):
    xr.testing.assert_equal(exact.coverage, results.coverage)
    assert replace(exact, influence=None, correlation=None).coverage is None


def test_estimates_without_a_common_checkpoint_are_not_compared(exact):
    apart = replace(
        exact, influence=exact.influence.sel(step=[20]), baselines={"exact influence": exact.exact.sel(step=[0, 5])}
    )
    assert apart.size_checks == {}
