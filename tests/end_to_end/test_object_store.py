"""A run on an object store is killed again and again, each time on a machine that knows nothing of the last."""

import multiprocessing
import os
import re
import shutil
import signal
from contextlib import suppress

import pytest
from object_store import SECRET, ObjectStore
from remote_driver import drive
from test_resume import contents, nobody_left
from tiny import write_run
from typer.testing import CliRunner

from stagewise.cli import app
from stagewise.run.config import load_config
from stagewise.run.pipeline import checkup, report, run

URL = "s3://bucket/runs/killed"
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["stagewise.run.pipeline", "s3fs", "botocore.session"])

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
    ("before", "PUT .*/objects/.*/000000[24]0-0000.zip"),
    ("after", "PUT .*/complete/cells/000000[24]0"),
    ("before", "GET .*/objects/.*/000000"),
    ("after", "PUT .*/objects/.*/exact-influence"),
    ("before", "PUT .*/complete/kept/exact-influence"),
    ("before", "PUT .*/complete/kept/gradient-product"),
    ("after", "PUT .*/objects/.*/retraining-windows"),
    ("after", "PUT .*/complete/kept/retraining-windows"),
    ("before", "PUT .*/complete/kept/replay"),
    ("after", "P.*/objects/.*/results.zip"),
    ("after", "PUT .*/complete/results"),
    ("before", "P.*/objects/.*/explorer.zip"),
    ("before", "PUT .*/complete/report.html"),
]
BY_WORKERS = {11, 12}  # of these, those whose cells two processes of their own compute


@pytest.fixture(scope="module")
def store():
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store
    store.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on this machine that nobody killed."""
    config = load_config(write_run(tmp_path_factory.mktemp("whole"), **SETTINGS))
    run(config)
    return config.out


def killed(store, process, moment):
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

    store.watch = watch
    process.start()
    process.join()
    with suppress(ProcessLookupError):
        assert nobody_left(process.pid)
    store.watch = lambda now, request: True
    return bool(came)


def test_a_run_killed_at_any_request_goes_on_from_the_store_alone_to_the_same_bits(tmp_path, cache, store, whole):
    config, log = write_run(tmp_path / "killed", **SETTINGS), tmp_path / "computed"
    done = {}
    for number, moment in enumerate([*KILLS, ("never", "")]):
        shutil.rmtree(cache, ignore_errors=True)  # another machine
        log.write_text("")
        settings = [f"out={URL}", f"workers={2 if number in BY_WORKERS else 1}"]
        process = processes.Process(target=drive, args=(config, settings, log))
        assert killed(store, process, moment) == (moment[0] != "never"), moment
        assert (process.exitcode == 0) == (moment[0] == "never"), moment
        now = store.complete("runs/killed")
        assert {name: now.get(name) for name in done} == {**done, **{n: now.get(n) for n in done if "/" not in n}}, moment
        computed = set(log.read_text().split())
        assert not computed & set(done), moment
        done = now
    folder = load_config(config, [f"out={URL}"]).folder
    assert contents(folder) == contents(whole)
    assert sorted(name for name in done if "/" in name) == sorted(
        path.relative_to(whole).as_posix() for part in ("cells", "kept") for path in (whole / part).iterdir()
    )
    assert len(KILLS) >= 20
