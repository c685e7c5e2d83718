"""The experiment on time windows, on a small lab."""

import numpy as np
import pytest
import zarr
from reading import assert_whole, check, value

from stagewise.explorer.page import write_explorer
from stagewise.studies.hierarchy.experiments.windows import gradient_products, window_kernel, windows
from stagewise.studies.hierarchy.lab import slope
from stagewise.studies.hierarchy.settings import RATE, REDUCED, WINDOW
from stagewise.studies.hierarchy.study import explored
from stagewise.studies.hierarchy.theory.tree import KINDS


@pytest.fixture(scope="module")
def in_windows(coarse):
    return windows(coarse)


def test_matrices_have_the_order_of_the_items_and_of_train_and_query_whatever_the_datasets_order(lab):
    shuffled = lab.measured_windows.sortby("train", ascending=False).sortby("query").transpose("query", "train", "step")
    got = lab.matrix(shuffled)
    dog, rose = (lab.items.names.index(name) for name in ("dog", "rose"))
    np.testing.assert_array_equal(got[:, dog, rose], lab.measured_windows["value"].sel(train="dog", query="rose"))
    np.testing.assert_array_equal(got[:, rose, dog], lab.measured_windows["value"].sel(train="rose", query="dog"))
    assert (got[:, dog, rose] != got[:, rose, dog]).any()


def test_window_ablation_is_the_gradient_kernel_at_the_windows_centre(in_windows):
    assert value(in_windows, "gradient kernel, closed form vs the network's own gradients") >= 0.999
    assert value(in_windows, "window ablation (length 0.1) vs gradient kernel") >= 0.98


def test_sampling_predicts_windows_in_order_and_in_size_with_nothing_fitted(in_windows):
    assert value(in_windows, "window ablation vs sampled BIF", ": r") >= 0.95
    assert abs(value(in_windows, "window ablation vs sampled BIF", ": slope") - 1) <= 0.15


def test_damped_influence_predicts_windows_in_order_and_in_size(in_windows):
    assert value(in_windows, "exact damped", ": r") >= 0.98
    assert abs(value(in_windows, "exact damped", ": slope") - 1) <= 0.15


def test_measured_windows_have_the_size_of_rate_times_window_times_gradient_products(lab):
    """A lost factor would leave every correlation as it is. An item that is left out is not first order in 25 steps."""
    centres = [step + WINDOW // 2 for step in lab.steps]
    products = -RATE * WINDOW * gradient_products(lab.aligned, centres)
    kernel = window_kernel(lab, RATE * np.array(centres))
    off = lab.off_diagonal
    assert slope(kernel[:, off], products[:, off]) == pytest.approx(1, abs=0.03)
    assert slope(products[:, off], lab.matrix(lab.measured_windows)[:, off]) == pytest.approx(1, abs=0.2)


def test_extrema_of_the_sweep_of_windows_lie_where_those_of_the_gradient_kernel_do(in_windows):
    assert value(in_windows, "sweep of windows", "distance") <= RATE * REDUCED.window_starts.step


def test_training_repairs_what_a_window_did(in_windows):
    least, most = check(in_windows, "sweep of windows", "least and largest share").values
    assert 0 <= least <= most
    assert most * value(in_windows, "mean loss of an item") < 1e-4


def test_whole_run_influence_peaks_later_than_that_of_a_moment(in_windows):
    for kind in KINDS.values():
        moment, whole = check(in_windows, f"harmful peak of {kind} pairs").values
        assert moment < whole


def test_no_target_is_missed_no_figure_empty_and_no_number_nan(in_windows):
    assert_whole(in_windows)


def test_aligned_run_can_be_looked_around_in_with_the_three_measures_and_what_was_left_out(coarse, tmp_path):
    results = explored(coarse)
    assert {"exact influence", "BIF", "damped influence"} <= set(results.agreements)
    write_explorer(results, tmp_path)
    data = zarr.open_group(tmp_path / "explorer" / "data.zarr", mode="r")
    for name in ("effect", "effect_stderr"):
        if name in coarse.removed_windows:
            effect = coarse.removed_windows[name].transpose("step", "train", "query").values
            np.testing.assert_allclose(data[f"measured/{name}"][...], effect, rtol=1e-6)
    two_times = data["two_times/value"]
    assert two_times.shape[0] == two_times.shape[1] == len(coarse.items.names)
    assert [entry["name"] for entry in data.attrs["influences"]] == ["exact influence", "BIF", "damped influence"]
