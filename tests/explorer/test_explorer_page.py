import base64
import hashlib
import json
import math
from html.parser import HTMLParser

import made_runs
import pytest

from stagewise.explorer.contents import write_store
from stagewise.explorer.page import export_page, render, store_of, write_explorer

EVIL = '</script><img src=x onerror="window.ran=1"><!--<script>'


class Page(HTMLParser):
    """Tags, and the text of every element by its tag; scripts by their type."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.policy, self._open = [], {}, "", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        self._open = known.get("type", tag)
        if known.get("http-equiv") == "Content-Security-Policy":
            self.policy = known["content"]

    def handle_endtag(self, _tag):
        self._open = None

    def handle_data(self, data):
        self.texts[self._open] = self.texts.get(self._open, "") + data

    @property
    def baked(self):
        return {path: base64.b64decode(text) for path, text in json.loads(self.texts["application/json"]).items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "data.zarr"
    labels = [EVIL, "b", "c", "d"]
    write_store(made_runs.digits(labels, title=f"</title>{EVIL}", config={"model": EVIL}), folder)
    return folder


def test_nothing_that_the_data_say_is_markup_of_the_page(store):
    html = render(store, math.inf)
    page = Page(html)
    assert page.tags == [
        "html",
        "head",
        *["meta"] * 4,
        "link",
        "title",
        "style",
        "body",
        "div",
        "p",
        "script",
        "script",
    ]
    assert html.count("</script") == 2
    assert page.texts["title"] == f"</title>{EVIL} – stagewise"
    assert EVIL in json.loads(page.baked["zarr.json"])["attributes"]["configuration"]["model"]


def test_the_policy_allows_the_script_of_the_page_and_no_other(store):
    page = Page(render(store, 0))
    digest = base64.b64encode(hashlib.sha256(page.texts["module"].encode()).digest()).decode()
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert directives["script-src"] == f"'sha256-{digest}'"
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"


def test_a_page_of_everything_holds_every_file_of_the_store(store):
    baked = Page(render(store, math.inf)).baked
    files = {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert baked == files


def test_what_is_baked_in_keeps_to_its_budget_and_begins_with_the_description(store):
    everything = render(store, math.inf)
    budget = 2 * (store / "zarr.json").stat().st_size
    page = render(store, budget)
    assert len(page) - len(render(store, 0)) < budget + 100 * len(Page(page).baked)
    assert len(page) < len(everything)
    assert next(iter(Page(page).baked)) == "zarr.json"
    assert Page(render(store, 0)).baked == {}


def test_a_run_is_exported_as_one_file_of_the_size_that_is_said(tmp_path):
    write_explorer(made_runs.hierarchy(), tmp_path / "run")
    size = export_page(tmp_path / "run", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size == size
    assert (tmp_path / "run" / "explorer" / "index.html").exists()


def test_a_run_without_a_page_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="stagewise report"):
        store_of(tmp_path)
