"""The documentation is where others point to it, and leaves out no public name."""

import re
from collections import Counter
from pathlib import Path

import pytest

import stagewise as sw

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?://)([^)\s#]+)(?:#([^)\s]+))?\)")


def anchor(heading):
    """As GitHub and MyST make them."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken(page):
    for path, part in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path
        if not target.exists():
            yield f"{path} is not there"
        elif part and part not in {anchor(h) for h in re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8"))}:
            yield f"{path} has no heading #{part}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_pages_and_headings_that_are_there(page):
    assert [*broken(ROOT / page)] == []


def test_a_link_to_a_page_or_a_heading_that_is_gone_would_be_found(tmp_path):
    (tmp_path / "there.md").write_text("# Which, and when?\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md#which-and-when) [b](there.md#other) [c](gone.md) [d](https://example.org/gone)")
    assert [*broken(page)] == ["there.md has no heading #other", "gone.md is not there"]


def test_every_public_name_is_on_one_page_of_the_reference():
    pages = (ROOT / "docs" / "reference" / "api").glob("*.md")
    shown = [
        re.findall(r"auto(?:function|class):: stagewise\.(\w+)$", page.read_text(), re.MULTILINE) for page in pages
    ]
    assert Counter(name for names in shown for name in names) == Counter(sw.__all__)
