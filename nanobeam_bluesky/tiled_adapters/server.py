"""Serve the catalogue of a folder to this machine, over HTTP."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from nanobeam_bluesky.tiled_adapters.catalog import api_key, build_app

__all__ = ["serve"]

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

CLOSE_SECONDS = 5


@contextmanager
def serve(
    folder: Path | str, *, readable_storage: Iterable[Path | str] = (), port: int = 0
) -> Iterator[str]:
    """Serve the catalogue in `folder` from a thread, for the length of a ``with`` block.

    The server listens on 127.0.0.1 alone and wants a key, drawn anew in each process.

    Parameters
    ----------
    folder, readable_storage
        As for `open_catalog`.
    port
        Port to listen on; any free one if 0.

    Yields
    ------
    url
        Address with the key, for a browser or `tiled.client.from_uri`.

    Raises
    ------
    OSError
        If the port is taken.
    """
    app = build_app(folder, readable_storage)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        config = uvicorn.Config(
            guarded(app),
            lifespan="on",
            log_level="warning",
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(
            target=server.run, args=([listener],), name="tiled server", daemon=True
        )
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError(f"the Tiled server of {folder} did not start: see the log")
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}?api_key={api_key()}"
        finally:
            server.should_exit = True
            thread.join(2 * CLOSE_SECONDS)


def guarded(app: Application) -> Application:
    """Wrap an application: 404 for paths that climb out of their route, and for GraphQL.

    Tiled serves its pages without asking for the key and does not confine their paths.
    """

    async def guard(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            path = re.sub(r"[/\\]+", "/", scope["path"])
            if ".." in path.split("/") or "\0" in path or path.startswith("/api/graphql"):
                await _refuse(scope["type"], send)
                return
            scope = {**scope, "path": path}  # a second slash would make it absolute
        await app(scope, receive, send)

    return guard


async def _refuse(kind: str, send: Any) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"Not found"})
