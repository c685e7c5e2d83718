import numpy as np
import pytest

from stagewise.studies.hierarchy import adam as module
from stagewise.studies.hierarchy.experiments.adam import Score, adam
from stagewise.studies.hierarchy.lab import Lab, Size


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CHECKPOINTS": 16, "SEEDS": 2, "SAMPLED_EVERY": 4}.items():
            patch.setattr(module, name, value)
        yield adam(Lab(tmp_path_factory.mktemp("lab"), Size(chains=16, workers=1)))


def value(experiment, part):
    (check,) = [check for check in experiment.checks if part in check.what]
    return float(check.value.split()[0])


def test_adams_metric_predicts_windows_and_the_euclidean_does_not(experiment):
    reached = value(experiment, "r in Adam's metric")
    assert reached >= 0.9
    assert value(experiment, "r in the Euclidean metric") < reached - 0.3


def test_sampling_in_adams_metric_agrees_with_windows_in_order_and_size(experiment):
    (check,) = [check for check in experiment.checks if "sampled" in check.what]
    r, size = check.value.strip(")").split(" (")
    assert float(r) > 0.85
    assert 0.5 < float(size) < 1.5


def test_the_figure_has_both_metrics_the_draws_and_three_pairs(experiment):
    (plate,) = experiment.section.parts
    assert len(plate.figure.axes) == 6


def test_checkpoints_spread_evenly_to_the_end_without_step_zero():
    steps = module.steps()
    assert (steps[-1], len(steps)) == (module.ADAM_LAST, module.CHECKPOINTS)
    assert np.ptp(np.diff([0, *steps])) <= 1


def test_score_keeps_size_apart_from_order():
    predicted = np.array([[1.0, -2.0, 3.0], [0.5, 0.1, -0.2]])
    assert Score.of(predicted, 4 * predicted) == pytest.approx((1, 1, 1, 4))
    assert Score.of(predicted, -predicted) == pytest.approx((-1, -1, 0, -1))
