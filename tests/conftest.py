"""What all tests share.

One thread per test process and all it starts: workers share the cores, and small tensors gain nothing from more.
Large libraries are imported where they are used: the process that only hands out the tests has no use for them.
Every sentence is printed on one line: where it would break depends on how many digits its numbers have.
"""

import gc
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest

# Files that take longest, so that they begin first and no process of `make test` is left with a long one at the end.
LONGEST = (
    "end_to_end/test_object_store.py",
    "end_to_end/test_resume.py",
    "sharded/",
    "studies/test_transitions.py",
    "property/test_agreement.py",
    "run/test_engine.py",
    "studies/test_localisation.py",
    "studies/test_leaving_out.py",
    "run/test_changed_tasks.py",
    "end_to_end/",
    "studies/",
    "retraining/test_baselines.py",
    "run/",
    "reporting/",
    "retraining/",
)


@pytest.fixture(scope="session", autouse=True)
def wide_terminal():
    from stagewise.cli.application import console

    os.environ["COLUMNS"] = "1000"  # of processes that are started
    console.width = 1000


@pytest.fixture(scope="module")
def no_pictures():
    """Reports without pictures, from the first test that asks for it to the last of its file."""
    from hurried import without_pictures

    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch.setattr)
        yield


@pytest.fixture
def no_pictures_here(monkeypatch):
    """As :func:`no_pictures`, for one test of a file whose others may want some."""
    from hurried import without_pictures

    without_pictures(monkeypatch.setattr)


@pytest.fixture(scope="module")
def object_store():
    """S3 on this machine, and the environment in which it is found."""
    from object_store import ObjectStore

    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store
    store.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder for mirrors of run folders on object stores."""
    monkeypatch.setenv("STAGEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pytest_collection_modifyitems(items):
    def place(item):
        return next((k for k, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Weights that a test did not seed are the same whatever has been tested before, here or by the other process."""
    import numpy as np
    import torch

    torch.default_generator.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def pytest_collection_finish():
    gc.freeze()  # libraries and tests stay: nothing is gained by looking through them for garbage again and again
    # Graphs of small tensors are many objects and little memory: a sixth of the time went there.
    gc.set_threshold(50_000)
