"""Reports of these runs are drawn in a hurry; how they look is tested where reports are."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def in_a_hurry(no_pictures):
    pass
