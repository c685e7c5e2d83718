"""A run on an object store is killed again and again, each time on a machine that knows nothing of the last."""

import os
import re
import shutil
import signal
from contextlib import suppress

import numpy as np
import pytest
from remote_driver import drive
from test_resume import contents, nobody_left, processes
from tiny import task, write_run
from typer.testing import CliRunner

import stagewise as sw
from object_store import SECRET
from stagewise.cli import app
from stagewise.run.config import load_config
from stagewise.run.pipeline import report, run
from stagewise.traces.store import RunMismatchError

URL = "s3://bucket/runs/killed"
SETTINGS = {"estimators": ["exact", "bif", "gradient"], "exemplars": 2, "workers": 1, "per": "group"}

# The request at which everything is killed: before the store does it, or before its answer arrives.
KILLS = [
    ("before", "PUT .*/identity/"),
    ("after", "PUT .*/identity/"),
    ("after", "PUT .*/objects/.*/config.yaml"),
    ("after", "PUT .*/complete/config.yaml"),
    ("before", "PUT .*/complete/labels.json"),
    ("before", "PUT .*/objects/.*/00000005-0000.zip.*partNumber=2"),
    ("after", "PUT .*/objects/.*/00000005-0000.zip.*partNumber=2"),
    ("before", r"POST .*/objects/.*/00000005-0000.zip\?uploadId"),
    ("after", r"POST .*/objects/.*/00000005-0000.zip\?uploadId"),
    ("before", "PUT .*/complete/cells/00000005"),
    ("after", "PUT .*/complete/cells/00000005"),
    ("after", "PUT .*/objects/.*/000000[24]0-0000.zip"),
    ("before", "GET .*/objects/.*/000000"),
    ("after", "PUT .*/objects/.*/exact-influence"),
    ("before", "PUT .*/complete/kept/exact-influence"),
    ("before", "PUT .*/complete/kept/gradient-product"),
    ("after", "PUT .*/objects/.*/retraining-windows"),
    ("after", "PUT .*/complete/kept/retraining-windows"),
    ("before", "PUT .*/complete/kept/repeating"),
    ("after", "P.*/objects/.*/results.zip"),
    ("after", "PUT .*/complete/results"),
    ("before", "P.*/objects/.*/explorer.zip"),
    ("before", "PUT .*/complete/report.html"),
]
BY_WORKERS = 11  # of these, the one at which two processes of their own compute cells


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on this machine that nobody killed."""
    config = load_config(write_run(tmp_path_factory.mktemp("whole"), **SETTINGS))
    run(config)
    return config.out


def killed(object_store, process, moment):
    """Run until the moment and kill all of its processes then; whether the moment came."""
    when, pattern = moment
    came = []

    def watch(now, request):
        if came:
            return False  # of a process that is dead
        if now == when and re.match(pattern, request):
            came.append(request)
            os.killpg(process.pid, signal.SIGKILL)
        return not came

    object_store.watch = watch
    process.start()
    process.join()
    with suppress(ProcessLookupError):
        assert nobody_left(process.pid)
    object_store.watch = lambda now, request: True
    return bool(came)


@pytest.mark.timeout(900)
def test_a_run_killed_at_any_request_goes_on_from_the_store_alone_to_the_same_bits(
    tmp_path, cache, object_store, whole
):
    config, log = write_run(tmp_path / "killed", **SETTINGS), tmp_path / "computed"
    environment, done = object_store.environment | {"STAGEWISE_CACHE": str(cache)}, {}
    for number, moment in enumerate([*KILLS, ("never", "")]):
        shutil.rmtree(cache, ignore_errors=True)  # another machine
        log.write_text("")
        settings = [f"out={URL}", f"workers={2 if number == BY_WORKERS else 1}"]
        process = processes.Process(target=drive, args=(config, settings, log, environment))
        assert killed(object_store, process, moment) == (moment[0] != "never"), moment
        assert (process.exitcode == 0) == (moment[0] == "never"), moment
        now = object_store.complete("runs/killed")
        assert done.keys() <= now.keys(), moment
        kept = {name: content for name, content in done.items() if name.startswith(("cells/", "kept/"))}
        assert kept.items() <= now.items(), moment
        assert not kept.keys() & set(log.read_text().split()), f"computed again until {moment}"
        done = now
    folder = load_config(config, [f"out={URL}"]).folder
    assert contents(folder) == contents(whole)
    assert sorted(name for name in done if "/" in name) == sorted(
        path.relative_to(whole).as_posix() for part in ("cells", "kept") for path in (whole / part).iterdir()
    )


def test_two_runs_on_two_machines_that_share_a_url_at_the_same_time_end_with_the_same_bits(
    tmp_path, object_store, whole, monkeypatch
):
    url, config = "s3://bucket/runs/shared", write_run(tmp_path, **SETTINGS)
    caches = [tmp_path / "one", tmp_path / "two"]
    both = [
        processes.Process(
            target=drive,
            args=(config, [f"out={url}"], tmp_path / "log", object_store.environment | {"STAGEWISE_CACHE": str(cache)}),
        )
        for cache in caches
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    for cache in (*caches, tmp_path / "three"):
        monkeypatch.setenv("STAGEWISE_CACHE", str(cache))
        store = sw.TraceStore.read_only(url)
        assert store.has(*object_store.complete("runs/shared"))
        assert contents(store.root) == contents(whole)


def every_file(*folders):
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_commands_on_another_machine_fetch_what_they_read_and_bring_back_what_they_write(tmp_path, cache, object_store):
    url = "s3://bucket/runs/commands"
    config = write_run(tmp_path / "run", workers=1, estimators=["bif", "gradient"], retraining=None)
    command = CliRunner().invoke

    def fresh(*arguments):
        shutil.rmtree(cache, ignore_errors=True)
        result = command(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    fresh("run", config, "-s", f"out={url}")
    assert not (tmp_path / "run" / "run").exists()
    before = object_store.complete("runs/commands")
    assert {"config.yaml", "labels.json", "provenance.json", "results", "report.html", "figures", "explorer"} < set(
        before
    )
    assert "step" in fresh("doctor", url)
    assert object_store.complete("runs/commands") == before
    shown = fresh("report", url)
    assert str(cache) in shown
    assert "report.html" in shown
    after = object_store.complete("runs/commands")
    assert {name for name in after if after[name] != before[name]} <= {"report.html", "explorer"}
    fresh("export", url, tmp_path / "page.html", "--jsonl", tmp_path / "lines.jsonl")
    assert "all right" in fresh("validate", tmp_path / "lines.jsonl")
    np.save(tmp_path / "scores.npy", np.eye(24, 16))
    scores = ["--name", "A", "--step", "20", "--helpful", "positive"]
    assert "A, step 20" in fresh("import", url, tmp_path / "scores.npy", *scores)
    shutil.rmtree(cache)
    assert "A" in report(url).baselines
    assert "report" in fresh("run", f"{url}/config.yaml")  # from nothing but the store
    assert object_store.complete("runs/commands").keys() == {*before, "imported/A.json"}


def test_python_takes_urls_wherever_it_takes_run_folders(tmp_path, cache, object_store):
    write_run(tmp_path)
    run, url = sw.Trajectory.from_directory(tmp_path / "checkpoints"), "s3://bucket/runs/python"
    posterior = sw.LocalPosterior(window=10)
    ours = sw.sample(task(), run, posterior, chains=4, draws=20, out=tmp_path / "local")
    theirs = sw.sample(task(), run, posterior, chains=4, draws=20, out=url)
    shutil.rmtree(cache)
    assert sw.bif(url).identical(sw.bif(ours))
    shutil.rmtree(cache)
    assert theirs.load(20).identical(ours.load(20))
    assert sw.TraceStore.read_only(url).blocks == ours.blocks
    with pytest.raises(RunMismatchError, match=rf"{url} holds another run:\n  sampling: differs"):
        sw.sample(task(), run, posterior, chains=4, draws=30, out=url)


def test_no_credentials_are_written_anywhere_or_told_in_errors(tmp_path, cache, object_store, capfd):
    url = "s3://bucket/runs/secrets"
    config = write_run(tmp_path / "run", **SETTINGS)
    run(load_config(config, [f"out={url}"]))
    object_store.watch = lambda when, request: when == "after"  # refuses all
    result = CliRunner().invoke(app, ["run", str(config), "-s", f"out={url}"])
    object_store.watch = lambda when, request: True
    assert result.exit_code == 1
    assert f"cannot read {url}: PermissionError: Forbidden" in result.output + "".join(capfd.readouterr())
    secrets = [value for name, value in object_store.environment.items() if "KEY" in name]
    assert SECRET in secrets
    said = [
        result.output.encode(),
        *(path.read_bytes() for path in every_file(cache, tmp_path)),
        *object_store.objects.values(),
    ]
    assert not [secret for secret in secrets for text in said if secret.encode() in text]


@pytest.mark.parametrize("out", [f"s3://me:{SECRET}@bucket/run", f"s3://bucket/run?X-Amz-Signature={SECRET}"])
def test_a_url_that_carries_a_secret_is_refused_and_not_repeated(tmp_path, cache, out):
    config = write_run(tmp_path)
    for arguments in (
        ["run", str(config), "-s", f"out={out}"],
        ["doctor", out],
        ["config", str(config), "-s", f"out={out}"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code in (1, 2)
        assert "must not carry" in result.output
        assert SECRET not in result.output
