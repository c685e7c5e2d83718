"""One browser for each module."""

import pytest
from viewing import CHROMIUM, Viewer


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="pip install stagewise[browser]")
    with api.sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def viewer(browser):
    """Of a page at an address. It must not have complained, and must have asked nobody else."""
    opened = []

    def make(url, **context):
        page = browser.new_context(**{"viewport": {"width": 1600, "height": 900}, **context}).new_page()
        opened.append(Viewer(page, url))
        return opened[-1]

    yield make
    for one in opened:
        one.page.context.close()
        assert one.complaints == []
        own = (one.url, "about:", "data:", "blob:")
        assert [url for url in one.asked if not url.startswith(own)] == []
