"""Every public name shows how it is used, and what is shown runs."""

import doctest
import importlib.util
import inspect

import numpy as np
import pytest
import torch
from torch import nn

import stagewise as sw
from stagewise.notebook import Drawn
from stagewise.run.config import load_config
from stagewise.run.pipeline import run

NAMES = [name for name in sw.__all__ if name != "RecorderCallback" or importlib.util.find_spec("transformers")]
SHOWN = {name: getattr(sw, name) for name in NAMES} | {"Drawn": Drawn, "causal_lm": sw.losses.causal_lm}
SHOWN |= {"sharded.sample": sw.sharded.sample, "sharded.window_influence": sw.sharded.window_influence}


@pytest.fixture(scope="module")
def first(tmp_path_factory, no_pictures):
    """A folder with the run ``runs/first`` of exact influence, which examples of run folders are about."""
    from end_to_end.tiny import write_run

    folder = tmp_path_factory.mktemp("examples")
    run(
        load_config(write_run(folder, out="runs/first", title="Two classes", estimators=["exact"], retraining=None), ())
    )
    return folder


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_runs_and_gives_what_it_shows(name, tmp_path, monkeypatch, request):
    source = inspect.getdoc(SHOWN[name])
    monkeypatch.chdir(request.getfixturevalue("first") if "runs/first" in source else tmp_path)
    given = {"sw": sw, "torch": torch, "np": np, "nn": nn, name: SHOWN[name]}
    runner = doctest.DocTestRunner(verbose=False)
    report = []
    for test in doctest.DocTestFinder(recurse=False).find(SHOWN[name], name, globs=given):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", SHOWN)
def test_every_public_name_has_an_example_and_none_is_skipped(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(SHOWN[name]) or "")
    assert examples
    assert not any(doctest.SKIP in example.options for example in examples)
