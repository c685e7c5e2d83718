import numpy as np
import pytest
import xarray as xr
from scipy.spatial.distance import pdist
from scipy.stats import special_ortho_group

from stagewise.dynamics.kernel_map import influence_map

DIMS = ("step", "sample", "other")
STEPS = [0, 10, 20, 30]


def kernel_of(places, **coords):
    """The kernel 1 - d^2 / 2 of points (step, sample, axis)."""
    places = np.asarray(places)
    value = 1 - ((places[:, :, None] - places[:, None]) ** 2).sum(-1) / 2
    return xr.Dataset({"value": (DIMS, value)}, {"step": STEPS[: len(places)]} | coords)


def unfolding():
    """Points whose longer axis becomes the shorter one: principal axes change places in the middle."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 3)))[0]
    basis = np.linalg.qr(np.column_stack([np.ones(12), basis]))[0][:, 1:3]
    return np.stack([basis * [2 - k / 2, 0.6 + k / 2] for k in range(4)])


def noisy(places, spread, replicates=16, seed=0):
    """Replicates of the kernel with independent symmetric noise of this standard deviation per sample."""
    kernel = kernel_of(places)
    noise = np.random.default_rng(seed).normal(size=(len(places), replicates, *kernel["value"].shape[1:]))
    noise = noise * np.sqrt(np.outer(spread, spread))
    noise = (noise + noise.swapaxes(-1, -2)) / np.sqrt(2)
    every = kernel["value"].values[:, None] + noise
    return kernel.assign(value=(DIMS, every.mean(1)), replicates=(("step", "replicate", *DIMS[1:]), every))


def test_a_plane_configuration_is_recovered_but_for_rotation_and_holds_all_the_spread():
    places = np.random.default_rng(1).normal(size=(2, 9, 2))
    got = influence_map(kernel_of(places))
    assert got["value"].dims == ("step", "sample", "axis")
    for found, true in zip(got["value"].values, places, strict=True):
        np.testing.assert_allclose(pdist(found), pdist(true), rtol=1e-9)
    np.testing.assert_allclose(got["value"].mean("sample"), 0, atol=1e-12)
    np.testing.assert_allclose(got["share"].sum("axis"), 1, rtol=1e-9)


def test_correlations_are_inner_products_of_unit_vectors_and_have_as_many_axes_as_these():
    units = np.random.default_rng(2).normal(size=(20, 3))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    kernel = xr.Dataset({"value": (DIMS, (units @ units.T)[None])}, {"step": [0]})
    got = influence_map(kernel, axes=5)
    np.testing.assert_allclose(got["share"][0, 3:], 0, atol=1e-9)
    np.testing.assert_allclose(pdist(got["value"][0]), pdist(units), atol=1e-7)


def test_steps_stay_in_one_frame_where_principal_axes_change_places():
    places = unfolding()
    got = influence_map(kernel_of(places))
    signs = np.sign((got["value"].values[0] * places[0]).sum(0))
    np.testing.assert_allclose(got["value"] * signs, places, atol=1e-9)
    alone = influence_map(kernel_of(places[-1:]))  # its own longest axis comes first
    assert abs(np.corrcoef(alone["value"][0, :, 0], places[-1, :, 1])[0, 1]) > 0.999
    np.testing.assert_allclose(got["share"], (places**2).sum(1) / (places**2).sum((1, 2))[:, None], rtol=1e-9)


def test_turning_every_step_at_random_changes_nothing():
    places, turns = unfolding(), special_ortho_group(2, seed=3).rvs(4)
    turned = kernel_of(np.einsum("sia,sab->sib", places, turns) + 5.0)
    np.testing.assert_allclose(influence_map(turned)["value"], influence_map(kernel_of(places))["value"], atol=1e-9)


def test_the_sign_of_the_first_step_is_fixed_whatever_the_order_of_numbers_in_an_eigenvector():
    got = influence_map(kernel_of(unfolding()))["value"].values[0]
    for axis in got.T:
        assert axis[np.abs(axis) >= np.abs(axis).max() / 2][0] > 0


def test_samples_with_noisier_correlations_have_larger_errors():
    spread = np.where(np.arange(12) < 6, 0.02, 0.2)
    got = influence_map(noisy(unfolding(), spread))
    error = got["stderr"].mean(("step", "axis"))
    assert got["stderr"].dims == ("step", "sample", "axis")
    assert error[6:].min() > error[:6].max()
    assert error[6:].mean() > 2 * error[:6].mean()


def test_errors_are_as_large_as_the_scatter_of_the_map_over_new_noise():
    places, spread = unfolding()[:1], np.full(12, 0.1)
    maps = [influence_map(noisy(places, spread, seed=seed)) for seed in range(60)]
    frame = influence_map(kernel_of(places))["value"].values[0]
    found = []
    for each in maps:
        left, _, right = np.linalg.svd(each["value"].values[0].T @ frame)
        found.append(each["value"].values[0] @ left @ right)
    scatter = np.std(found, axis=0, ddof=1)
    claimed = np.sqrt(np.mean([each["stderr"].values[0] ** 2 for each in maps], axis=0))
    assert 0.8 < np.sqrt((claimed**2).mean() / (scatter**2).mean()) < 1.25


def test_labels_and_other_coordinates_of_samples_are_kept_and_errors_need_replicates():
    got = influence_map(kernel_of(unfolding(), label=("sample", list("aaabbbcccddd"))))
    assert got["label"].values.tolist() == list("aaabbbcccddd")
    assert "stderr" not in got


def test_samples_that_are_all_alike_lie_in_one_point():
    got = influence_map(xr.Dataset({"value": (DIMS, np.ones((1, 4, 4)))}, {"step": [0]}))
    assert np.abs(got["value"]).max() < 1e-7
    assert not got["share"].any()


@pytest.mark.parametrize(
    ("change", "axes", "message"),
    [
        (lambda kernel: kernel.rename(other="query"), 2, r"value \('step', 'sample', 'other'\), got"),
        (lambda kernel: kernel.rename(value="corr"), 2, r"got \['corr'\]"),
        (lambda kernel: kernel.isel(other=slice(5)), 2, r"got \(12, 5\) samples and others"),
        (lambda kernel: kernel * np.nan, 2, "must be finite"),
        (lambda kernel: kernel + xr.DataArray(np.arange(12.0), dims="other"), 2, "the same both ways"),
        (lambda kernel: kernel, 12, "fewer than the 12 samples, got 12"),
        (lambda kernel: kernel, 0, "at least 1"),
    ],
)
def test_what_is_no_kernel_is_refused(change, axes, message):
    with pytest.raises(ValueError, match=message):
        influence_map(change(kernel_of(unfolding())), axes=axes)
