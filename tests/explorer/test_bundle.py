"""The page that is shipped is the one whose source stands in the repository."""

import hashlib
from pathlib import Path

import stagewise

SOURCES = Path(__file__).parents[2] / "explorer"
BUNDLE = Path(stagewise.__file__).parent / "explorer" / "bundle"


def digest(folder, names):
    found = hashlib.sha256()
    for name in sorted(names):
        found.update(f"{name}\0".encode() + (folder / name).read_bytes() + b"\0")
    return found.hexdigest()


def test_bundle_is_what_was_built_from_the_sources_that_are_there():
    own = [path.relative_to(SOURCES).as_posix() for path in (SOURCES / "src").rglob("*") if path.is_file()]
    stamp = dict(line.split() for line in (BUNDLE / "sha256.txt").read_text().splitlines())
    there = {
        "sources": digest(SOURCES, ["package-lock.json", "vite.config.ts", *own]),
        "bundle": digest(BUNDLE, ["explorer.js", "explorer.css"]),
    }
    assert stamp == there, "explorer/ was changed: build it again with `make explorer`, and commit"


def test_licences_of_what_is_in_the_bundle_come_with_it():
    text = (BUNDLE / "LICENSES.txt").read_text(encoding="utf-8")
    for name in ("@observablehq/plot", "d3-scale", "zarrita"):
        assert f"{name} " in text
    assert "Licence: undefined" not in text
