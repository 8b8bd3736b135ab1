"""Serve the catalogue of a folder, or a Tiled configuration, over HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
import yaml
from pydantic import ValidationError
from tiled.config import Config
from tiled.server.utils import API_KEY_COOKIE_NAME
from tiled.utils import parse, prepend_to_sys_path

from nanobeam_bluesky.tiled_adapters.catalog import (
    MEDIA_TYPES,
    STREAMING,
    VIEWS,
    build_app,
    configuration,
)

__all__ = ["print_config", "serve", "serve_config"]

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

CLOSE_SECONDS = 5
LOCALHOST = "127.0.0.1"


@contextmanager
def serve(
    folder: Path | str,
    *,
    readable_storage: Iterable[Path | str] = (),
    root_map: Mapping[str, str] | None = None,
    compute: bool = False,
    host: str = LOCALHOST,
    port: int = 0,
) -> Iterator[str]:
    """Serve the catalogue in `folder` from a thread, for the length of a ``with`` block.

    The server wants a key: that of ``TILED_SINGLE_USER_API_KEY``, or one drawn anew in each
    process.

    Parameters
    ----------
    folder, readable_storage
        As for `open_catalog`.
    root_map
        Folders of the documents' paths → where they are mounted here; for ``scans/``.
    compute
        Whether raw runs without a derived one are analysed when their maps are asked for.
    host
        Address to listen on; others than this machine's own let others in.
    port
        Port to listen on; any free one if 0.

    Yields
    ------
    url
        Address with the key, for a browser or `tiled.client.from_uri`.

    Raises
    ------
    OSError
        If the port is taken, or the folder is a file.
    RuntimeError
        If Tiled does not start: says why.
    """
    config = configuration(folder, readable_storage, root_map=root_map, compute=compute)
    with _serving(Config.model_validate(config), str(folder), host, port) as url:
        yield url


@contextmanager
def serve_config(
    file: Path | str, *, host: str = LOCALHOST, port: int | None = None
) -> Iterator[str]:
    """Serve a Tiled configuration with our views, as `serve` does a folder.

    Where it mounts no view of this package, each catalogue at ``…/raw`` gets one at ``…/scans``
    and each at ``…/derived`` one at ``…/maps``. Streaming and our media types are added, raw
    assets are not served, unless it says otherwise; nobody is let in without a key or a login.

    Parameters
    ----------
    file
        The configuration (YAML).
    host
        As for `serve`; that of the file does not count.
    port
        Port to listen on; that of the file, or 8000, if absent.

    Raises
    ------
    ValueError
        If the configuration is none, or has neither views nor catalogues for them.
    OSError, RuntimeError
        As `serve` does.
    """
    file = Path(file)
    try:
        with prepend_to_sys_path(file.parent):
            config = Config.model_validate(_completed(parse(file)))
        if port is None:
            port = int(config.uvicorn.get("port", 8000))
        with _serving(config, str(file), host, port) as url:
            yield url
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from None
    except ValidationError as error:  # whose own words have the values, keys included
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{file}: {found}") from None


def _completed(config: Any) -> dict[str, Any]:
    """Return a configuration with what is ours, where that is missing."""
    if not isinstance(config, dict):
        raise ValueError(f"expected a Tiled configuration (YAML), found {type(config).__name__}")
    theirs = config.get("media_types") or {}
    ours = {spec: types | theirs.get(spec, {}) for spec, types in MEDIA_TYPES.items()}
    trees: list[Any] = config.get("trees") or []
    completed = {"expose_raw_assets": False, "streaming_cache": STREAMING} | config
    completed |= {"media_types": theirs | ours}
    if any(str(tree.get("tree")).startswith(f"{VIEWS}:") for tree in trees):
        return completed
    added = []
    for tree in trees:
        parent, _, name = str(tree.get("path")).rstrip("/").rpartition("/")
        view = {"raw": "scans", "derived": "maps"}.get(name)
        if view and tree.get("tree") in ("catalog", "tiled.catalog:from_uri"):
            args = tree.get("args") or {}
            node = args.get("mount_node") or ""
            storage = [
                *(args.get("readable_storage") or ()),
                *(args.get("writable_storage") or ()),
            ]
            viewed = {
                "uri": args.get("uri"),
                "mount_node": node if isinstance(node, str) else "/".join(node),
                "readable_storage": storage,
            }
            added.append({"path": f"{parent}/{view}", "tree": f"{VIEWS}:{view}", "args": viewed})
    if not added:
        paths = [tree.get("path") for tree in trees] or ["/ (catalog)"]
        raise ValueError(
            f"no catalogue at …/raw or …/derived, and no view {VIEWS}:…: found {paths}. "
            "Mount them as 'nanobeam serve --print-config' shows"
        )
    return completed | {"trees": [*trees, *added]}


@contextmanager
def _serving(config: Config, what: str, host: str, port: int) -> Iterator[str]:
    app = build_app(config)
    failures: list[Exception] = []
    key = config.authentication.single_user_api_key
    query = f"?api_key={key}" if key and not config.authentication.providers else ""
    with _listening(host, port) as listener:
        own = {k: v for k, v in config.uvicorn.items() if k not in ("host", "port")}
        options = {"log_level": "warning", "timeout_graceful_shutdown": CLOSE_SECONDS} | own
        server = uvicorn.Server(
            uvicorn.Config(_telling(guarded(app), failures), lifespan="on", **options)
        )

        def run() -> None:
            with suppress(SystemExit):  # of a server that did not start
                server.run([listener])

        thread = threading.Thread(target=run, name="tiled server", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    reason = next(iter(failures), "see the log")
                    raise RuntimeError(f"Tiled did not start for {what}: {reason}")
                time.sleep(0.02)
            scheme = "https" if server.config.is_ssl else "http"
            yield f"{scheme}://{_address(host, listener)}{config.root_path}{query}"
        finally:
            server.should_exit = True
            thread.join(2 * CLOSE_SECONDS)


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {host}, port {port}") from None
    return listener


def _address(host: str, listener: socket.socket) -> str:
    """Return what others, or a browser here, can open."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def is_private(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def guarded(app: Application) -> Application:
    """Wrap an application: 404 for paths that climb out of their route, and for GraphQL.

    Tiled serves its pages without asking for the key and does not confine their paths. Its Zarr
    routes give arrays to anyone: here they, too, want what the others do. Keys that it cannot
    compare with its own get 401.
    """

    async def guard(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            path = re.sub(r"[/\\]+", "/", scope["path"])
            route = path.removeprefix(scope.get("root_path") or "")
            if ".." in path.split("/") or "\0" in path or route.startswith("/api/graphql"):
                await _refuse(scope["type"], send, 404, b"Not found")
                return
            if any(not key.isascii() or "\\" in key for key in _keys(scope)):
                await _refuse(scope["type"], send, 401, b"Invalid API key")
                return
            if b"%0a" in scope["query_string"].lower() or b"%0d" in scope["query_string"].lower():
                await _refuse(scope["type"], send, 400, b"Line breaks in the query")
                return  # a file's name would break the answer's header
            scope = {**scope, "path": path}  # a second slash would make it absolute
            if route.startswith("/zarr/"):
                status = await _status(
                    app, scope, f"{scope.get('root_path') or ''}/api/v1/metadata/"
                )
                if status != 200:
                    await _refuse(scope["type"], send, status, b"Not authenticated")
                    return
        await app(scope, receive, send)

    return guard


async def _status(app: Application, scope: Scope, path: str) -> int:
    """Return how an application answers a request for another path."""
    begun = asyncio.Event()
    status = 500

    async def receive() -> Mapping[str, Any]:
        if begun.is_set():
            await asyncio.Event().wait()  # nobody goes away
        begun.set()
        return {"type": "http.request", "body": b""}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    state = dict(scope.get("state") or {})
    await app({**scope, "path": path, "method": "GET", "state": state}, receive, send)
    return status


def _keys(scope: Scope) -> Iterator[str]:
    """Yield the keys of a request, wherever they stand."""
    for name, value in parse_qsl(scope["query_string"].decode("latin-1")):
        if name == "api_key":
            yield value
    for header, content in scope["headers"]:
        if header == b"authorization":
            yield content.decode("latin-1")
        elif header == b"cookie":
            for cookie in content.decode("latin-1").split(";"):
                if cookie.strip().startswith(API_KEY_COOKIE_NAME):
                    yield cookie


def _telling(app: Application, failures: list[Exception]) -> Application:
    """Wrap an application: why it does not start goes to a list, not in full to the log."""

    async def tell(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return

        async def brief(message: Mapping[str, Any]) -> None:
            await send({**message, "message": ""})

        try:
            await app(scope, receive, brief)
        except Exception as error:
            failures.append(error)

    return tell


async def _refuse(kind: str, send: Any, status: int, reason: bytes) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": reason})


# ------------------------------------------------------------- for a Tiled of one's own

_HEAD = """\
# Scans and maps of nanobeam-bluesky in a Tiled of your own: with this package installed, and
#     HDF5_USE_FILE_LOCKING=FALSE         or a reader may keep a detector from its file
#     TILED_SINGLE_USER_API_KEY=…         or an `authentication:` for several users
# in the environment,
#     tiled serve config THIS_FILE
# or, with files confined to the readable folders, and every route wanting the key,
#     nanobeam serve --config THIS_FILE
"""
_COMMENTS = {
    "trees": """\
# Catalogues of raw and of derived runs, and the views on them: arrays on the scan grid.
# Put in your own catalogues, with the same uri and mount_node in their views. Views read tables,
# too, so their readable_storage needs the writable one. readable_storage is where detectors write.
# PostgreSQL, after `tiled catalog init URI`:
#     uri: postgresql://USER:PASSWORD@HOST/catalog
#     writable_storage: [/…/arrays, postgresql://USER:PASSWORD@HOST/tables]
# Views take, beside, preset: auto, and that of scans root_map: {/ioc/data: /data}; that of maps
# compute: {folder: /data/computed}, to analyse raw runs whose maps are asked for.
""",
    "create_mount_nodes_if_not_exist": "# raw and derived are made at the first start.\n",
    "expose_raw_assets": "# Whole files can hold more than the run; arrays are enough.\n",
    "streaming_cache": """\
# Lets clients subscribe to runs. In memory for one process; else, or beyond a restart,
#     uri: redis://HOST:6379
""",
    "media_types": "# What runs and arrays can be downloaded as, beside Tiled's own.\n",
}


def print_config(
    folder: Path | str,
    readable_storage: Iterable[Path | str] = (),
    *,
    root_map: Mapping[str, str] | None = None,
    compute: bool = False,
) -> str:
    """Return a Tiled configuration (YAML, with comments) of what `serve` serves."""
    config = configuration(folder, readable_storage, root_map=root_map, compute=compute)
    config = json.loads(json.dumps(config))  # or YAML would point from one list to its other uses
    sections = [
        _COMMENTS.get(name, "")
        + yaml.safe_dump({name: value}, sort_keys=False, width=100, allow_unicode=True)
        for name, value in config.items()
    ]
    return "\n".join([_HEAD, *sections])
