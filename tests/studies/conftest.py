"""The labs that the tests of the experiments share."""

from dataclasses import replace

import pytest

from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.settings import REDUCED


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), replace(REDUCED, draws=64))


@pytest.fixture(scope="session")
def coarse(tmp_path_factory):
    """With fewer checkpoints, for what looks at each of them and not at the times between."""
    return Lab(tmp_path_factory.mktemp("coarse"), replace(REDUCED, checkpoints=6, draws=64))
