"""The page of a run on the loopback interface: at an address that nobody can guess, and nothing but reading."""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from stagewise.explorer.page import STORE, render, store_of

HOST = "127.0.0.1"

_FIRST = 192 * 1024  # bytes baked in, so that the page appears after one request; the rest is read when it is asked for


def application(folder: str | Path, token: str) -> Starlette:
    """What answers below ``/token/``: the page and its store, read-only. Anything else is not found.

    Args:
        folder: of the run.
        token: part of the address.

    Raises:
        FileNotFoundError: the run has no page yet.
    """
    store = store_of(folder)

    @lru_cache(maxsize=1)
    def rendered(_: int) -> str:
        return render(store, _FIRST)

    def page(_: Request) -> HTMLResponse:
        # A store that was written anew meanwhile is another page.
        written = (store / "zarr.json").stat().st_mtime_ns
        return HTMLResponse(rendered(written), headers={"Cache-Control": "no-store"})

    routes = [Route(f"/{token}/", page), Mount(f"/{token}/{STORE}", _Store(directory=store))]
    # A page of somebody else's that has this address under a name of its own gets nothing: DNS rebinding.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts, Middleware(GZipMiddleware, minimum_size=2**16, compresslevel=6)])


class _Store(StaticFiles):
    """The store's files, as long as they are those of the page that asks (``?v=`` and their id)."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        asked = Request(scope).query_params.get("v")
        about = json.loads((Path(str(self.directory)) / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        if asked is not None and asked != about["id"]:
            return PlainTextResponse("the results were written anew", status_code=409)
        return await super().get_response(path, scope)


def listen(port: int = 0) -> socket.socket:
    """A socket on the loopback interface; port 0 is a free one.

    Raises:
        OSError: the port is taken.
    """
    # Named as TCP, or asyncio leaves Nagle's algorithm on, and every answer in two parts waits 40 ms for the second.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # elsewhere it would let another process listen at the same port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # from now on a browser waits, and is not refused
    except OSError as error:
        listener.close()
        raise OSError(f"port {port} cannot be used ({error.strerror}); leave --port out for a free one") from None
    return listener


def address(listener: socket.socket, token: str) -> str:
    """Where the page is."""
    return f"http://{HOST}:{listener.getsockname()[1]}/{token}/"


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer until Ctrl-C."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    with suppress(KeyboardInterrupt):  # which is how it ends
        uvicorn.Server(config).run(sockets=[listener])


def new_token() -> str:
    """128 bits, in letters that an address may have."""
    return secrets.token_urlsafe(16)
