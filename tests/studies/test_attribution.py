from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from stagewise.studies.hierarchy.estimators import endpoint, labelled
from stagewise.studies.hierarchy.experiments.attribution import attribution, datamodelling_score, truth
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.resemblance import exact_influence, over_starts, resemblance
from stagewise.studies.hierarchy.settings import RATE, REDUCED


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), replace(REDUCED, checkpoints=8, chains=16, draws=48))


@pytest.fixture(scope="module")
def experiment(lab):
    return attribution(lab)


def test_subset_losses_are_those_of_training(experiment):
    assert [check.reached for check in experiment.checks if check.comparison] == [True]


def test_every_estimator_has_a_score_at_every_time(experiment):
    plate, table = experiment.section.parts
    assert [row[0] for row in table.rows].count("BIF, sampled") == 2
    assert len(table.rows) == 11
    assert not any("–" in cell or "—" in cell for row in table.rows for cell in row)
    assert len(plate.figure.axes) == 4


def test_early_in_training_all_estimates_of_the_time_order_the_halves(experiment):
    firsts = {check.what: check.values[0] for check in experiment.checks if check.what.startswith("LDS of the")}
    assert len(firsts) == 11
    assert min(value for what, value in firsts.items() if "end of training" not in what) > 0.8


def test_the_table_marks_damped_influence_that_is_not_localised(experiment):
    _, table = experiment.section.parts
    marked = {row[0] for row in table.rows if any(cell.endswith("*") for cell in row)}
    assert marked == {"damped"}


def test_losses_themselves_as_an_attribution_of_small_changes_score_one(lab):
    steps, subsets = [300], [[q for q in range(8) if q != p] for p in range(8)]
    losses, kept = truth(lab, lab.random, subsets, steps)
    exact = labelled(lab, exact_influence(lab, 0, RATE * np.array(steps)), steps)
    assert datamodelling_score(exact, losses, kept)["lds"].item() == pytest.approx(1)


def test_a_step_without_an_estimate_has_no_score(lab):
    steps = [250, 325]
    losses, kept = truth(lab, lab.random, [[0, 1, 2], [3, 4, 5], [0, 3, 6], [1, 4, 7], [0, 1, 7]], steps)
    exact = labelled(lab, exact_influence(lab, 0, RATE * np.array(steps)), steps).sel(step=[325])
    assert np.isfinite(datamodelling_score(exact, losses, kept)["lds"]).values.tolist() == [False, True]


def test_the_endpoint_is_the_last_step_everywhere(lab):
    estimate = labelled(lab, np.arange(2.0)[:, None, None] * np.ones((2, 8, 8)), [1, 2])
    got = endpoint({"a": estimate}, [1, 2])["a"]
    xr.testing.assert_equal(got["value"], xr.ones_like(estimate["value"]))
    assert "train_size" in got.coords


def test_likeness_is_one_with_oneself_and_blind_to_the_diagonal():
    last = np.random.default_rng(0).normal(size=(8, 8))
    got = resemblance(np.stack([-last, last + 9 * np.eye(8), last]))
    np.testing.assert_allclose(got, [-1, 1, 1])


def test_over_most_starts_early_influence_is_unlike_that_at_the_end(lab):
    starts = over_starts(lab, np.array([1.7, 4.5, 6.0]))
    early, late, _ = np.median(starts, 0)
    assert early < 0 < late
