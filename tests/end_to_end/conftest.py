"""Reports of these runs are drawn in a hurry, without files for papers; how they look is tested where reports are."""

import pytest
import tiny


@pytest.fixture(autouse=True, scope="module")
def screen_only():
    with pytest.MonkeyPatch.context() as patch:
        tiny.without_files_for_papers(patch.setattr)
        yield
