"""The page as one file: the built program, and as much of the store as is wanted baked in.

What is not baked in is read from ``data.zarr`` beside the page, over HTTP. A page of which all is baked in works from
disk, and wherever else one file can be put.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html import escape
from importlib.resources import files
from pathlib import Path

from stagewise.explorer.contents import write_store
from stagewise.results import Results
from stagewise.traces.files import write_text
from stagewise.traces.mirror import local

FOLDER, STORE = "explorer", "data.zarr"
"""In a run folder, and in there."""

_BAKED = 16 * 2**20  # bytes of a run's own page, which opens from disk unless the store is larger
_CSP = (
    "default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div id="app"><p class="empty">Reading the results ...</p></div>
<script type="application/json" id="baked">{baked}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def write_explorer(results: Results, folder: Path) -> Path:
    """Write ``explorer/`` into a run folder: the store, and a page that reads it.

    Returns:
        The path of the page, ``index.html``.
    """
    target = Path(folder) / FOLDER
    write_store(results, target / STORE)
    page = target / "index.html"
    write_text(page, render(target / STORE, _BAKED))
    return page


def export_page(folder: str | Path, path: Path) -> int:
    """Bake a run's page with all of its data into one file.

    Args:
        folder: of the run.
        path: of the file, which appears or is replaced as a whole.

    Returns:
        Its size in bytes.

    Raises:
        FileNotFoundError: the run has no page yet.
    """
    text = render(store_of(folder), math.inf)
    write_text(path, text)
    return len(text.encode("utf-8"))


def store_of(folder: str | Path) -> Path:
    """The store in a run folder.

    Raises:
        FileNotFoundError: there is none.
    """
    store = local(folder, FOLDER) / FOLDER / STORE
    if not (store / "zarr.json").is_file():
        raise FileNotFoundError(f"{folder} has no page yet; write it with `stagewise report {folder}`")
    return store


def render(store: Path, budget: float) -> str:
    """The page, with the store's own description and its smallest files baked in up to so many bytes."""
    bundle = files("stagewise.explorer") / "bundle"
    script = (bundle / "explorer.js").read_text(encoding="utf-8").replace("</script", "<\\/script")
    style = (bundle / "explorer.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    about = json.loads((store / "zarr.json").read_text(encoding="utf-8"))["attributes"]
    return _PAGE.format(
        policy=escape(_CSP.format(digest=digest), quote=True),
        title=escape(f"{about['title']} – stagewise"),
        style=style,
        baked=json.dumps(_baked(store, budget)),
        script=script,
    )


def _baked(store: Path, budget: float) -> dict[str, str]:
    """Files in base64 by their path; base64 has no character that could end a script."""
    found: dict[str, str] = {}
    left = budget
    paths = sorted(
        (path for path in store.rglob("*") if path.is_file()),
        key=lambda path: (path.parent != store, path.name != "zarr.json", path.stat().st_size, path),
    )
    for path in paths:
        left -= path.stat().st_size * 4 / 3
        if left < 0:
            break
        found[path.relative_to(store).as_posix()] = base64.b64encode(path.read_bytes()).decode("ascii")
    return found
