import numpy as np
import pytest

from stagewise.influence.phases import phase_decomposition
from stagewise.influence.trusted import TracesInMemory
from stagewise.studies.hierarchy.experiments.two_phases import LABELS, draws_at, traces_of, two_phases
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.settings import REDUCED
from stagewise.studies.hierarchy.theory.double_well import (
    FLIPS,
    HARMFUL,
    HELPFUL,
    LATE,
    LOSSES,
    exact,
    formula_peak,
    integrated_peak,
    losses,
    plateau,
)


def pair_of(dataset, pair):
    return dataset.sel(train=pair[0], query=pair[1])


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return two_phases(Lab(tmp_path_factory.mktemp("lab"), REDUCED))


def test_every_target_is_reached(experiment):
    missed = [check for check in experiment.checks if check.reached is False]
    assert not missed
    assert sum(check.reached is True for check in experiment.checks) == 4


def test_the_figure_is_drawn_and_the_finding_has_its_numbers(experiment):
    (plate,) = experiment.section.parts
    assert len(plate.figure.axes) == 7
    assert "nan" not in experiment.findings[0]


def test_quadrature_obeys_the_law_of_total_covariance():
    for odds in (-3.0, 0.4):
        at = exact(odds)
        np.testing.assert_allclose(at["within"].sum("phase") + at["between"], at["total"], rtol=0, atol=1e-12)
        assert at["weight"][1] == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-3)


def test_draws_have_the_moments_of_the_quadrature():
    seen = losses(draws_at(0.7, 100, 1000, seed=3)).reshape(-1, len(LOSSES))
    truth = exact(0.7)["total"].values
    doubt = np.sqrt((truth**2 + np.outer(np.diag(truth), np.diag(truth))) / len(seen))
    assert np.abs(-np.cov(seen.T) - truth).max() < 5 * doubt.max()


def test_a_pair_on_whose_mean_losses_phases_agree_flips_without_a_spike():
    before, half, after = (pair_of(exact(odds), FLIPS) for odds in (-4, 0, 4))
    assert before["total"] < -0.05
    assert after["total"] > 0.05
    assert abs(half["between"]) < 1e-4


def test_spikes_have_the_sign_of_the_disagreement_and_are_absent_on_either_side():
    for pair, sign in ((HELPFUL, -1), (HARMFUL, 1)):
        before, half, after = (sign * pair_of(exact(odds), pair)["total"] for odds in (-4, 0, 4))
        assert half > 0.03
        assert max(abs(before), abs(after)) < 0.1 * half


def test_the_peak_is_at_half_only_if_the_phases_own_covariances_agree():
    assert formula_peak(HELPFUL) == pytest.approx(0.5, abs=1e-3)
    assert formula_peak(LATE) > 0.6
    assert integrated_peak(LATE) == pytest.approx(formula_peak(LATE), abs=0.005)


def test_correlation_is_flat_where_covariance_spikes():
    assert plateau(HELPFUL) > 1.5


def test_the_peak_by_formula_follows_from_sampled_parts_too():
    walk = draws_at(0.0, 64, 256, seed=5)
    got = phase_decomposition(TracesInMemory({0: traces_of(walk)}, LABELS), {0: np.where(walk > 0, "second", "first")})
    at = pair_of(got, LATE).sel(step=0)
    first, second = (-at["within"] / at["weight"]).values
    peak = 0.5 + (second - first) / (2 * -at["between"].item() / at["weight"].prod().item())
    assert peak == pytest.approx(formula_peak(LATE), abs=0.02)
