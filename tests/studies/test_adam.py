from dataclasses import replace

import numpy as np
import pytest

from stagewise.studies.hierarchy.experiments.adam import ADAM_LAST, Agreement, adam, checkpoints
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.settings import FULL, REDUCED


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return adam(Lab(tmp_path_factory.mktemp("lab"), replace(REDUCED, chains=16)))


def value(experiment, part):
    (check,) = [check for check in experiment.checks if part in check.what]
    return check.value


def test_adams_metric_predicts_windows_and_the_euclidean_does_not(experiment):
    reached = value(experiment, "r in Adam's metric")
    assert reached >= 0.9
    assert value(experiment, "r in the Euclidean metric") < reached - 0.3


def test_sampling_in_adams_metric_agrees_with_windows_in_order_and_size(experiment):
    assert value(experiment, "r sampled") > 0.85
    assert 0.5 < value(experiment, "slope measured / predicted, sampled") < 1.5


def test_every_kind_of_agreement_has_a_range_over_starts_that_holds_its_median(experiment):
    spread = [check for check in experiment.checks if "median [range]" in check.what]
    assert len(spread) == 8
    assert all(check.lower[0] < check.value < check.upper[0] for check in spread)


def test_the_figure_has_both_metrics_the_draws_and_three_pairs(experiment):
    (plate,) = experiment.section.parts
    assert len(plate.figure.axes) == 6


@pytest.mark.parametrize("settings", [FULL, REDUCED])
def test_checkpoints_spread_evenly_to_the_end_without_step_zero(settings):
    steps = checkpoints(settings)
    assert (steps[-1], len(steps)) == (ADAM_LAST, settings.adam_checkpoints)
    assert np.ptp(np.diff([0, *steps])) <= 1


def test_agreement_keeps_size_apart_from_order():
    predicted = np.array([[1.0, -2.0, 3.0], [0.5, 0.1, -0.2]])
    assert Agreement.of(predicted, 4 * predicted) == pytest.approx((1, 1, 1, 4))
    assert Agreement.of(predicted, -predicted) == pytest.approx((-1, -1, 0, -1))
