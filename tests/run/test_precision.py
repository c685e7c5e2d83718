"""Chains that are as long as it takes."""

import math

import numpy as np
import pytest
import xarray as xr
from built_anew import make_task

import stagewise as sw
from stagewise.influence.precision import relative_error
from stagewise.sampling.chains import sample_block
from stagewise.traces import underway

POSTERIOR = sw.LocalPosterior(window=5, n_beta=200.0)
FEW = {"chains": 4, "burn_in": 6, "thinning": 1, "batching": "stacked"}
AUTO = {**FEW, "draws": "auto", "most_draws": 300}


def checkpoint(step=5):
    return sw.Checkpoint(step, make_task().state(), sw.Optimizer("sgd", 0.05, batch_size=0))


RUN = sw.Trajectory.from_checkpoints([checkpoint()])


def drawn(error, **settings):
    return sample_block(make_task(), checkpoint(), POSTERIOR, sw.Chains(**AUTO | settings), error=error)


def same(tree, other):
    of_tree, of_other = tree.to_dict(), other.to_dict()
    return all(xr.Dataset.equals(of_tree[path], of_other[path]) for path in ("/train", "/queries/q", "/chains"))


@pytest.mark.parametrize(("wanted", "draws"), [(64, 64), (128, 128), (200, 256), (1000, 300)])
def test_it_looks_at_every_doubling_and_stops_where_the_error_is_small_or_the_most_is_drawn(wanted, draws):
    looked = []

    def error(tree):
        looked.append(tree["train"].sizes["draw"])
        return 0.1 if looked[-1] >= wanted else 0.11

    tree = drawn(error)
    assert tree["train"].sizes["draw"] == draws
    assert looked == [n for n in (64, 128, 256, 300) if n <= draws]
    fixed = sample_block(make_task(), checkpoint(), POSTERIOR, sw.Chains(**FEW, draws=draws))
    assert same(tree, fixed)
    assert tree.attrs["relative_error"] == (0.1 if draws >= wanted else 0.11)


def test_chains_that_more_draws_do_not_mend_end_at_the_first_look():
    assert drawn(lambda tree: math.nan)["train"].sizes["draw"] == 64
    assert drawn(lambda tree: math.inf)["train"].sizes["draw"] == 300


def test_a_run_is_as_precise_as_asked_for_by_the_errors_of_its_own_influence(tmp_path):
    few, many = (
        sw.sample(make_task(), RUN, POSTERIOR, out=tmp_path / str(precision), **AUTO | {"precision": precision})
        for precision in (0.5, 0.12)
    )
    assert few.load(5)["train"].sizes["draw"] < many.load(5)["train"].sizes["draw"]
    for store, precision in ((few, 0.5), (many, 0.12)):
        influence, numbers = sw.bif(store), sw.diagnose_run(store)
        reached = float(np.sqrt((influence.stderr**2).mean() / (influence.value**2).mean()))
        assert numbers["relative_error"].item() == pytest.approx(reached)
        assert reached <= precision or store.load(5)["train"].sizes["draw"] == 300


def test_a_killed_run_goes_on_to_the_same_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(underway, "SECONDS", 0.0)
    settings = {**AUTO, "precision": 1e-6, "most_draws": 150, "batching": "loop"}
    whole = sw.sample(make_task(), RUN, POSTERIOR, out=tmp_path / "whole", **settings).load(5)
    for after in (70, 71, 140):  # the first look is after step 6 + 64

        def kill(what, done, total, after=after):
            if what == "steps of this cell" and done > after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sw.sample(make_task(), RUN, POSTERIOR, out=tmp_path / "killed", progress=kill, **settings)
    assert sw.sample(make_task(), RUN, POSTERIOR, out=tmp_path / "killed", **settings).load(5).identical(whole)


def test_noise_alone_is_an_error_of_about_its_size_and_chains_that_disagree_are_too_short():
    tree = sample_block(make_task(), checkpoint(), POSTERIOR, sw.Chains(**FEW, draws=64))
    random = np.random.default_rng(0)
    for path in ("train", "queries/q"):
        loss = tree[path]["loss"]
        tree[path]["loss"] = loss.copy(data=tree[path]["loss_anchor"].values + random.normal(size=loss.shape))
    assert 0.5 < relative_error(tree) < 1.5
    tree["train"]["loss"] = tree["train"]["loss"] + 5 * tree["chains"]["chain"]
    assert relative_error(tree) == math.inf


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"blocks": 2}, "leave out blocks=2"), ({"precision": 0.0}, "precision"), ({"draws": "all"}, "draws")],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        sw.Chains(**AUTO | settings)


def test_without_an_error_to_go_by_it_is_refused():
    with pytest.raises(ValueError, match="pass error="):
        drawn(None)
