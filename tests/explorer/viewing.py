"""The real application on a free port, and a browser at it."""

import csv
import io
import shutil
import threading
from contextlib import contextmanager
from urllib.parse import parse_qs, urlencode

import uvicorn

from stagewise.explorer.serve import address, application, listen

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKEN = "secret"
VIEWS = ("matrix", "two-times", "data", "proof", "map", "chains")


@contextmanager
def served(folder):
    """The address of the page of a run."""
    listener = listen()
    server = uvicorn.Server(uvicorn.Config(application(folder, TOKEN), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address(listener, TOKEN)
    finally:
        server.should_exit = True
        thread.join()


class Viewer:
    """A page, what it complained about, and what it asked for."""

    def __init__(self, page, url):
        self.page, self.url, self.complaints, self.asked = page, url, [], []
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, **state):
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}#{urlencode(state)}")
        self.page.wait_for_selector("#app[data-done]")
        return self

    def done(self):
        return int(self.page.get_attribute("#app", "data-done"))

    def after(self, act):
        """Do something, and wait until the page has changed."""
        before = self.done()
        act()
        self.page.wait_for_function("before => document.getElementById('app').dataset.done > before", arg=before)

    @property
    def state(self):
        return {key: value for key, (value,) in parse_qs(self.page.evaluate("location.hash.slice(1)")).items()}

    def downloaded(self, figure, button):
        with self.page.expect_download() as download:
            self.page.click(f"#{figure} .take button:text-is('{button}')")
        assert download.value.suggested_filename == f"{figure}.{button.lower()}"
        return download.value.path().read_bytes()

    def table(self, figure):
        """What the CSV of a figure says: its columns, and its rows as texts."""
        columns, *rows = csv.reader(io.StringIO(self.downloaded(figure, "CSV").decode()))
        return columns, rows
