import numpy as np
import pytest
import xarray as xr

from stagewise.dynamics.spectrum import top_eigenvalue_share

LABELS = [f"group {i}" for i in range(6)]
DELTA = np.array([1.0, 2.0, -1.0, 0.5, -2.0, -0.5])  # sums to zero
UNIT = DELTA / np.linalg.norm(DELTA)


def influence(matrices, replicates=None):
    value = np.array(matrices, float)
    dims = ("step", "train", "query")
    data = {"value": (dims, value), "stderr": (dims, np.zeros_like(value))}
    if replicates is not None:
        spread = replicates.std(1, ddof=1) / np.sqrt(replicates.shape[1])
        data |= {"stderr": (dims, spread), "replicates": (("step", "replicate", "train", "query"), replicates)}
    labels = LABELS[: value.shape[1]]
    return xr.Dataset(data, {"step": range(len(value)), "train": labels, "query": labels})


def noisy(matrix, rng, stderr, replicates=16):
    parts = matrix + stderr * np.sqrt(replicates) * rng.normal(size=(1, replicates, *matrix.shape))
    return influence(parts.mean(1), parts)


@pytest.mark.parametrize("sign", [-1, 1])
def test_two_phase_transition_is_a_single_direction_whatever_all_samples_share(sign):
    common, tilt = np.full((6, 6), 7.0), np.add.outer(np.arange(6.0), 3 * np.arange(6.0))
    antisymmetric = np.triu(np.ones((6, 6)), 1) - np.tril(np.ones((6, 6)), -1)
    got = top_eigenvalue_share(influence([sign * np.outer(DELTA, DELTA) + common + tilt + antisymmetric]))
    assert got["share"].item() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(got["direction"][0], UNIT, atol=1e-12)
    assert got["stderr"].item() == 0


def test_share_is_the_largest_size_over_the_sum_of_sizes_even_if_negative():
    other = np.array([1.0, -1.0, 0, 0, 0, 0]) - UNIT * (np.array([1.0, -1.0, 0, 0, 0, 0]) @ UNIT)
    other /= np.linalg.norm(other)
    matrix = -3 * np.outer(UNIT, UNIT) + np.outer(other, other)
    got = top_eigenvalue_share(influence([matrix]))
    assert got["share"].item() == pytest.approx(3 / 4, rel=1e-12)
    np.testing.assert_allclose(got["direction"][0], UNIT, atol=1e-12)


def test_constant_influence_has_share_and_direction_zero_not_rounding():
    got = top_eigenvalue_share(influence([np.full((6, 6), 0.1), np.zeros((6, 6))]))
    assert not got["share"].any()
    assert not got["direction"].any()


def test_direction_does_not_jump_in_sign_between_steps():
    rng = np.random.default_rng(0)
    symmetric = np.array([1.0, 1, 1, -1, -1, -1])  # all entries of one size: the largest is a matter of noise
    matrices = [np.outer(symmetric, symmetric) + 0.01 * rng.normal(size=(6, 6)) for _ in range(20)]
    assert (top_eigenvalue_share(influence(matrices))["direction"].sel(train="group 0") > 0).all()


def test_rank_one_matrix_plus_noise_gives_share_and_direction_within_their_standard_errors():
    rng, truth, errors, inside = np.random.default_rng(1), np.outer(DELTA, DELTA), [], []
    for _ in range(100):
        got = top_eigenvalue_share(noisy(truth, rng, 0.05)).isel(step=0)
        errors.append(((got["direction"] - UNIT) / got["direction_stderr"]).values)
        inside.append(got["share"].item())
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(1, abs=0.15)
    assert 0.9 < np.mean(inside) < 1


def test_an_arbitrary_sign_does_not_become_doubt_about_the_direction():
    delta = np.array(
        [1.0, -2.0, 1.0, -1.0, 2.0, -1.0]
    )  # the first entry is half the largest: either sign may be chosen
    for seed in range(20):
        got = top_eigenvalue_share(noisy(np.outer(delta, delta), np.random.default_rng(seed), 0.1))
        assert (got["direction_stderr"] < 0.05).all()


def test_standard_error_is_the_scatter_of_the_share():
    rng, shares, doubts = np.random.default_rng(2), [], []
    matrix = np.outer(DELTA, DELTA) + np.diag([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    for _ in range(100):
        got = top_eigenvalue_share(noisy(matrix, rng, 0.3)).isel(step=0)
        shares.append(got["share"].item())
        doubts.append(got["stderr"].item())
    assert np.sqrt(np.mean(np.square(doubts))) == pytest.approx(np.std(shares), rel=0.25)


def test_errors_without_replicates_are_not_turned_into_certainty():
    data = noisy(np.outer(DELTA, DELTA), np.random.default_rng(3), 0.1)
    got = top_eigenvalue_share(data.drop_vars("replicates"))
    assert set(got.data_vars) == {"share", "direction"}


def test_queries_are_paired_with_training_groups_by_label_not_by_position():
    data = noisy(np.outer(DELTA, DELTA) + np.diag(np.arange(6)), np.random.default_rng(4), 0.1)
    shuffled = data.isel(query=[3, 1, 5, 0, 2, 4])
    xr.testing.assert_identical(top_eigenvalue_share(shuffled), top_eigenvalue_share(data))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.assign_coords(query=[f"val:{name}" for name in LABELS]),
        lambda d: d.isel(query=slice(4)),
        lambda d: d.isel(train=[0, 1], query=[0, 1]),
    ],
)
def test_matrices_that_are_not_square_in_their_labels_are_refused(spoil):
    with pytest.raises(ValueError, match="expected the same three or more labels for train and query"):
        top_eigenvalue_share(spoil(influence([np.eye(6)])))


def test_a_single_sample_among_groups_is_refused_because_its_own_variance_would_be_the_share():
    data = influence([np.outer(DELTA, DELTA) + 1000 * np.diag([1.0, 0, 0, 0, 0, 0])])
    assert top_eigenvalue_share(data)["share"].item() > 0.98
    with pytest.raises(ValueError, match=r"\['group 0'\] are single samples .*leave single-sample groups out, or take"):
        top_eigenvalue_share(data.assign_coords(train_size=("train", [1, 5, 5, 5, 5, 5])))
    for sizes in ([1] * 6, [2, 5, 5, 3, 5, 5]):
        got = top_eigenvalue_share(data.assign_coords(train_size=("train", sizes)))
        assert got["share"].item() == top_eigenvalue_share(data)["share"].item()


def test_number_labels_are_paired_with_their_text():
    data = noisy(np.outer(DELTA, DELTA) + np.diag(np.arange(6)), np.random.default_rng(4), 0.1)
    mixed = data.assign_coords(train=range(6), query=list("012345")).isel(query=[3, 1, 5, 0, 2, 4])
    got = top_eigenvalue_share(mixed)
    assert got["train"].values.tolist() == list(range(6))
    for name in ("share", "direction", "direction_stderr"):
        np.testing.assert_array_equal(got[name], top_eigenvalue_share(data)[name])
