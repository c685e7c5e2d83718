"""What the explorer costs a reader of a large run: bytes and time until it is drawn, and time of every choice after.

    python benchmarks/explorer.py [FOLDER]

A made-up run of 100 checkpoints, 256 queries and 10,000 training samples (256 million float32, 2 GB on disk, kept in
FOLDER where one is given), written and served by what `stagewise explore` uses. Headless Chromium opens it, and the
query, the step and the sample are changed in every view, by keys and by typing: the time is from the event of the
input to the frame in which the page has changed, each piece of the data being read for the first time. Medians. It
needs Chromium and `pip install stagewise[browser]`, 5 GB of memory, and a few minutes: no part of `make bench`.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
import xarray as xr
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.table import Table

from stagewise.explorer.page import FOLDER, write_explorer
from stagewise.explorer.serve import address, application, listen
from stagewise.results import EXACT, Results

CHECKPOINTS, QUERIES, SAMPLES, GROUPS, CHANGES = 100, 256, 10_000, 10, 11
BYTES, FIRST, REPAINT = 500_000, 1.0, 0.1
VIEWS = ("matrix", "two-times", "data", "proof", "map", "chains")
console = Console(width=110)

# In the page: when it was first complete, and how long every change took, from its event to the frame after it.
WATCH = """
window.changes = [];
for (const kind of ["keydown", "change"])
  addEventListener(kind, (event) => { if (event.key !== "Enter") window.since = event.timeStamp; }, true);
document.addEventListener("DOMContentLoaded", () => {
  const app = document.getElementById("app");
  new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => {
    const now = performance.now();
    if (window.complete === undefined) window.complete = now;
    else window.changes.push(now - window.since);
    app.dataset.painted = app.dataset.done;
  }))).observe(app, { attributeFilter: ["data-done"] });
});
"""


def influence(trains: list[Any], generator: np.random.Generator) -> xr.Dataset:
    """Random walks, so that curves look like curves."""
    shape = (CHECKPOINTS, len(trains), QUERIES)
    value = generator.standard_normal(shape, dtype=np.float32)
    value *= 1e-4
    np.cumsum(value, axis=0, out=value)
    dims = ("step", "train", "query")
    coords = {"step": steps(), "train": trains, "query": [f"query {k}" for k in range(QUERIES)]}
    size = 1 if len(trains) == SAMPLES else SAMPLES // GROUPS
    data = {"value": (dims, value), "stderr": (dims, np.broadcast_to(np.float32(0), shape))}
    return xr.Dataset(data, {**coords, "train_size": ("train", np.full(len(trains), size))}, {"estimator": EXACT})


def steps() -> list[int]:
    return [10 * k for k in range(CHECKPOINTS)]


def made_up() -> Results:
    """A run with something for every view."""
    generator = np.random.default_rng(0)
    groups = influence([f"group {k}" for k in range(GROUPS)], generator)
    single = influence([str(k) for k in range(SAMPLES)], generator)
    loss = np.linspace(2, 0.1, CHECKPOINTS)
    queries = groups["query"].values
    losses = xr.Dataset(
        {"train": ("step", loss), "queries": (("step", "query"), np.outer(loss, np.linspace(0.8, 1.2, QUERIES)))},
        {"step": steps(), "query": queries},
    )
    rest = {name: ("step", generator.random(CHECKPOINTS)) for name in ("rhat", "ess_bulk", "even_share", "loss_rise")}
    said = {"verdict": ("step", ["ok"] * CHECKPOINTS), "advice": ("step", [""] * CHECKPOINTS)}
    at = steps()[::25]
    effect = -(SAMPLES // GROUPS) * 0.2 * groups["value"].sel(step=at)
    measured = effect.to_dataset(name="effect").assign_attrs(weight=0.8, window=10)
    bins = steps()[:20]
    two_times = xr.Dataset(
        {
            "value": (
                ("trained", "asked", "train", "query"),
                generator.standard_normal((20, 20, GROUPS, QUERIES), dtype=np.float32),
            )
        },
        {
            "trained": bins,
            "trained_stop": ("trained", steps()[1:21]),
            "asked": steps()[1:21],
            "train": groups["train"],
            "query": queries,
        },
    )
    labels = ("sample", generator.integers(GROUPS, size=SAMPLES).astype(str))
    positions = xr.Dataset(
        {
            "value": (("step", "sample", "axis"), generator.standard_normal((CHECKPOINTS, SAMPLES, 2))),
            "share": (("step", "axis"), np.full((CHECKPOINTS, 2), 0.1)),
        },
        {"step": steps(), "sample": np.arange(SAMPLES), "label": labels},
    )
    pictures = generator.integers(0, 256, (SAMPLES, 28, 28), dtype=np.uint8)
    return Results(
        title="A large run that was made up",
        losses=losses,
        diagnostics=xr.Dataset({**said, **rest}, {"step": steps()}),
        influence=None,
        baselines={EXACT: groups},
        single={EXACT: single},
        measured=measured,
        in_two_times=two_times,
        positions=positions,
        draws=xr.DataArray(generator.random((CHECKPOINTS, 4, 200)), {"step": steps()}, ("step", "chain", "draw")),
        samples=xr.Dataset(
            {"label": labels, "image": (("sample", "height", "width"), pictures)}, {"sample": np.arange(SAMPLES)}
        ),
    )


def first_paint(page: Page, url: str) -> tuple[int, float]:
    """Bytes that came over the wire, headers included, and seconds, until the page is complete."""
    received = 0

    def count(event: dict[str, Any]) -> None:
        nonlocal received
        received += event["encodedDataLength"]

    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    network.on("Network.loadingFinished", count)
    page.goto(url)
    page.wait_for_selector("#app[data-painted]")
    return received, page.evaluate("complete") / 1e3


def change(page: Page, act: Callable[[int], None]) -> float:
    """Median seconds from the event to the frame."""
    page.evaluate("changes.length = 0")
    for k in range(CHANGES):
        done = page.evaluate("Number(document.getElementById('app').dataset.done)")
        act(k)
        page.wait_for_function("done => document.getElementById('app').dataset.painted > done", arg=done)
    times = page.evaluate("changes")
    assert len(times) == CHANGES, f"{len(times)} repaints for {CHANGES} changes"
    return statistics.median(times) / 1e3


def view(page: Page, url: str, name: str, by: str) -> list[float]:
    """Seconds of a change of query, step and training datum."""
    page.goto("about:blank")
    page.goto(f"{url}#view={name}&by={by}")
    page.wait_for_selector("#app[data-painted]")

    def typed(k: int) -> None:
        page.fill("#of", str(37 * k + 5))
        page.press("#of", "Enter")

    def chosen(k: int) -> None:
        page.select_option("#of", index=(k + 1) % GROUPS)

    keys = [change(page, lambda _, key=key: page.press("h1", key)) for key in ("ArrowDown", "ArrowRight")]
    return [*keys, change(page, typed if page.locator("input#of").count() else chosen)]


def table(page: Page, url: str) -> Table:
    shown = Table("view", "influence of", "query (ms)", "step (ms)", "training datum (ms)", box=None)
    for name in VIEWS:
        for member, by in (("groups", "influence/0"), ("samples", "influence/1")):
            times = view(page, url, name, by)
            shown.add_row(name, member, *(f"[{'green' if t <= REPAINT else 'red'}]{1e3 * t:.0f}" for t in times))
    return shown


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    start = time.process_time()
    if not (folder / FOLDER / "index.html").exists():
        write_explorer(made_up(), folder)
        console.print(f"written in {time.process_time() - start:.0f} s of processor time")
    listener = listen()
    server = uvicorn.Server(uvicorn.Config(application(folder, "token"), log_level="warning"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    url = address(listener, "token")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = play.chromium.launch(executable_path=executable, args=options)
        found = []
        for _ in range(5):
            page = browser.new_context(viewport={"width": 1600, "height": 900}).new_page()
            page.add_init_script(WATCH)
            found.append(first_paint(page, url))
        size, seconds = (statistics.median(column) for column in zip(*found, strict=True))
        console.print(f"until it is drawn: {size / 1e3:.0f} kB (at most {BYTES / 1e3:.0f}), {seconds:.2f} s ({FIRST})")
        console.print(f"from a change to the frame that shows it (at most {1e3 * REPAINT:.0f} ms):")
        console.print(table(page, url))
        browser.close()
    server.should_exit = True
    if len(sys.argv) < 2:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
