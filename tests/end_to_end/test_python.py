"""The way through in Python, as the documentation shows it."""

from tiny import task, write_run

import stagewise as sw


def test_prediction_and_measurement_meet_by_label(tmp_path):
    write_run(tmp_path)
    run, study = sw.Trajectory.from_directory(tmp_path / "checkpoints"), task()
    traces = sw.sample(study, run, posterior=sw.LocalPosterior(window=10), chains=4, draws=40, out=tmp_path / "a")
    assert sw.diagnose_run(str(tmp_path / "a")).identical(sw.diagnose_run(traces))
    influence = sw.bif(traces)
    assert influence["train"].values.tolist() == ["class 0", "class 1"]
    assert all(event.train in influence["train"] for event in sw.events(influence))
    measured = sw.window_ablation(study, run, window=10)
    scores = sw.agreement(sw.predicted_effect(influence, weight=0.8)["effect"], measured["effect"])
    assert scores["step"].values.tolist() == [5, 20, 40]


def test_step_0_of_an_adam_run_has_the_metric_that_adam_will_have_after_the_window(tmp_path):
    write_run(tmp_path)
    recorded = sw.Trajectory.from_directory(tmp_path / "checkpoints")
    start = sw.Checkpoint(0, task().state(), recorded.load(5).optimizer)
    run = sw.Trajectory.from_checkpoints([start, recorded.load(40)])
    traces = sw.sample(task(), run, posterior=sw.LocalPosterior(window=10), chains=2, draws=20, out=tmp_path / "a")
    assert traces.steps == (0, 40)
    assert (traces.load(0)["chains"]["status"] != "unusable").all()
