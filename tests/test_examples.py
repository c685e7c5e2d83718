"""Every public name shows how it is used, and what is shown runs."""

import doctest
import importlib.util
import inspect

import numpy as np
import pytest
import torch
from torch import nn

import stagewise as sw

WITHOUT = {"RecorderCallback", "report"}
NAMES = [name for name in sw.__all__ if name != "RecorderCallback" or importlib.util.find_spec("transformers")]


def examples_of(name):
    return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(sw, name)) or "")


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs_and_gives_what_it_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"sw": sw, "torch": torch, "np": np, "nn": nn, name: getattr(sw, name)}
    runner = doctest.DocTestRunner(verbose=False)
    report = []
    for test in doctest.DocTestFinder(recurse=False).find(getattr(sw, name), name, globs=given):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_every_public_name_has_an_example_but_these():
    assert {name for name in NAMES if not examples_of(name)} == WITHOUT & set(NAMES)
