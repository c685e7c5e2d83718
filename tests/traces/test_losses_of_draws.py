"""The mean training loss of every draw, for those who look whether chains agree."""

import numpy as np
from synthetic_cells import make_cell, make_empty_cell

from stagewise.influence.trusted import TracesInMemory
from stagewise.traces.draws import mean_losses_of_draws


def test_mean_weighs_samples_by_their_share_and_stands_at_its_step():
    tree = make_cell(step=20)
    share = tree["train"]["share"] * np.arange(tree["train"].sizes["sample"])
    tree["train"] = tree["train"].to_dataset().assign(share=share)
    found = mean_losses_of_draws(TracesInMemory({10: make_cell(step=10), 20: tree}))
    assert found.dims == ("step", "chain", "draw")
    expected = np.average(tree["train"]["loss"].values, -1, share.values)  # where shares sum to less than 1
    np.testing.assert_allclose(found.sel(step=20).values, expected)


def test_steps_with_fewer_draws_end_in_nan_and_steps_without_are_left_out():
    short = make_cell(step=20).isel(draw=slice(3))
    traces = TracesInMemory({10: make_cell(step=10), 20: short, 30: make_empty_cell()})
    found = mean_losses_of_draws(traces)
    assert found["step"].values.tolist() == [10, 20]
    assert np.isfinite(found.sel(step=10)).all()
    assert np.isnan(found.sel(step=20)).sum("draw").values.tolist() == [3, 3]


def test_traces_without_single_losses_have_no_curve_of_draws():
    assert mean_losses_of_draws(TracesInMemory({30: make_empty_cell()})) is None
