"""What the tests of the experiments look at: checks by their words, figures by their names, and what all must have."""

import re

import numpy as np
from matplotlib.figure import Figure

from stagewise.reporting.page import Plate
from stagewise.reporting.tables import Table


def check(experiment, *parts):
    (found,) = [c for c in experiment.checks if all(part in c.what for part in parts)]
    return found


def value(experiment, *parts):
    return check(experiment, *parts).value


def plate(experiment, name) -> Figure:
    (found,) = [p for p in experiment.section.parts if isinstance(p, Plate) and p.name == name]
    return found.figure


def assert_whole(experiment):
    """No target is missed, no figure is empty, and no number is NaN."""
    assert not [c for c in experiment.checks if c.reached is False]
    assert [c for c in experiment.checks if c.reached]
    for part in experiment.section.parts:
        assert part.rows if isinstance(part, Table) else part.figure.axes
    assert np.isfinite([v for c in experiment.checks for v in (*c.values, *c.lower, *c.upper, *c.target)]).all()
    texts = [*experiment.findings, *(c.found for c in experiment.claims)]
    assert not [text for text in texts if re.search(r"\b(nan|inf|None)\b", text)]
