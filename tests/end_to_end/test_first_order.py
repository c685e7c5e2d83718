"""Runs whose chains record their losses to first order: what is known of it is in the report, and where it is not."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import xarray as xr
from tiny import write_run

import stagewise as sw
from stagewise.reporting.findings import findings
from stagewise.run import first_order
from stagewise.run.checkup import checkup
from stagewise.run.config import load_config
from stagewise.run.estimators import OneByOne
from stagewise.run.pipeline import report, run
from stagewise.run.task_file import load_task

LINEAR = {"chains": 4, "draws": 40, "batching": "stacked", "linear": True}


def written(folder, **changes):
    return load_config(write_run(folder, **{"sampling": LINEAR, "estimators": ["bif"], "retraining": None} | changes))


def solved(config, **asked):
    """First order, computed apart from the run."""
    task, trajectory = load_task(config.task, {}), sw.Trajectory.from_directory(config.checkpoints)
    if config.sampling.sampler == "window":
        return sw.response_influence(task, trajectory, config.posterior, at="checkpoint", **asked)
    return sw.damped_influence(task, trajectory, config.posterior, curvature="hessian", **asked)


@pytest.mark.parametrize("sampler", ["underdamped", "window"])
def test_a_report_is_to_first_order_without_noise_and_needs_no_model_to_be_written_again(tmp_path, sampler):
    config = written(tmp_path, sampling=LINEAR | {"sampler": sampler})
    found = run(config)
    xr.testing.assert_allclose(found.influence, sw.bif(config.out, first_order=solved(config)))
    assert (found.influence["stderr"] < 0.7 * sw.bif(config.out)["stderr"]).all()
    exemplar, single = found.exemplars[0], solved(config, per="sample")
    alone = sw.bif(OneByOne(sw.TraceStore.read_only(config.out), single["step"].values.tolist()), first_order=single)
    of_query = alone.sel(step=exemplar.step, query=exemplar.query)["value"].values
    np.testing.assert_allclose(exemplar.values, of_query[exemplar.samples])
    assert any("first order says of it without noise" in sentence for sentence in findings(found))
    shutil.rmtree(tmp_path / "checkpoints")
    again = report(config.out)
    xr.testing.assert_identical(again.influence, found.influence)
    assert "first order says of it without noise" in (config.out / "report.html").read_text(encoding="utf-8")


def test_single_samples_are_completed_too(tmp_path):
    config = written(tmp_path, per="sample")
    single = run(config).single["BIF"]
    traces = OneByOne(sw.TraceStore.read_only(config.out), [5, 20, 40])
    expected = sw.bif(traces, first_order=solved(config, per="sample"))
    np.testing.assert_allclose(single["value"], expected["value"])
    assert (single["stderr"] < 0.7 * sw.bif(traces)["stderr"]).mean() > 0.9


def impossible(found):
    raise ValueError("conjugate gradients met negative curvature")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (impossible, "conjugate gradients met negative curvature"),
        (lambda found: found.assign(value=3 * found["value"]), "not what the draws show"),
    ],
)
def test_a_step_without_a_first_order_or_with_one_that_the_draws_contradict_is_named_and_of_the_draws_alone(
    tmp_path, monkeypatch, change, words
):
    solver = first_order.solver

    def elsewhere(*given):
        solve = solver(*given)
        return lambda steps: change(solve(steps=steps)) if steps == [20] else solve(steps=steps)

    monkeypatch.setattr(first_order, "solver", elsewhere)
    config = written(tmp_path)
    found = run(config)
    reasons = json.loads(found.influence.attrs["first_order_omitted"])
    assert list(reasons) == ["20"]
    assert words in reasons["20"]
    alone, known = sw.bif(config.out), solved(config)
    xr.testing.assert_allclose(found.influence.sel(step=20), alone.sel(step=20))
    others = sw.bif(config.out, first_order=known).sel(step=[5, 40])
    xr.testing.assert_allclose(found.influence.sel(step=[5, 40]), others)
    (sentence,) = [sentence for sentence in findings(found) if "the chains alone have" in sentence]
    assert sentence.startswith("At 1 checkpoint (step 20) first order has no answer")
    assert words in sentence
    xr.testing.assert_identical(report(config.out).influence, found.influence)


def test_first_order_that_exists_nowhere_is_said_and_the_draws_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(first_order, "solver", lambda *_: lambda steps: impossible(steps))
    config = written(tmp_path)
    found = run(config)
    xr.testing.assert_allclose(found.influence, sw.bif(config.out))
    assert found.influence.attrs["first_order"] == "sampled"
    assert any("At 3 checkpoints (steps 5, 20 and 40) first order has no answer" in said for said in findings(found))


def test_a_folder_with_more_steps_than_the_last_run_asked_for_is_answered_there_by_the_draws_alone(tmp_path):
    run(written(tmp_path))
    found = run(load_config(tmp_path / "config.yaml", ["steps=[5, 20]"]))
    assert found.influence["step"].values.tolist() == [5, 20, 40]
    assert list(json.loads(found.influence.attrs["first_order_omitted"])) == ["40"]
    assert [step for step, *_ in checkup(tmp_path / "run").rows] == ["5", "20", "40"]  # the doctor is asked then
    xr.testing.assert_identical(report(tmp_path / "run").influence, found.influence)


def test_a_step_that_is_contradicted_where_there_is_no_other_leaves_nothing_to_first_order(tmp_path, monkeypatch):
    solver = first_order.solver
    wrong = partial(xr.Dataset.map, func=lambda values: 3 * values, keep_attrs=True)
    monkeypatch.setattr(first_order, "solver", lambda *given: lambda steps: wrong(solver(*given)(steps=steps)))
    found = run(load_config(write_run(tmp_path, sampling=LINEAR, estimators=["bif"], retraining=None, steps=[20])))
    assert list(json.loads(found.influence.attrs["first_order_omitted"])) == ["20"]
    assert found.influence.attrs["first_order"] == "sampled"
    assert not any("first order says of it without noise" in sentence for sentence in findings(found))
