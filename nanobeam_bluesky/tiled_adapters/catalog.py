"""The embedded catalogue: a folder with raw and derived runs, read by Tiled in process."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import create_async_engine
from tiled.alembic_utils import stamp_head
from tiled.catalog.alembic_constants import ALEMBIC_DIR, ALEMBIC_INI_TEMPLATE_PATH
from tiled.catalog.core import initialize_database
from tiled.client import from_context
from tiled.client.container import Container
from tiled.client.context import Context
from tiled.config import Config
from tiled.server import schemas
from tiled.server.app import build_app_from_config
from tiled.server.settings import get_settings

from nanobeam_bluesky.documents.roots import Roots
from nanobeam_bluesky.tiled_adapters.confined import Confined, folders_of
from nanobeam_bluesky.tiled_adapters.stacks import STACKS

__all__ = [
    "MEDIA_TYPES",
    "STREAMING",
    "VIEWS",
    "api_key",
    "build_app",
    "configuration",
    "open_catalog",
]

logger = logging.getLogger("nanobeam_bluesky")

VIEWS = "nanobeam_bluesky.tiled_adapters.views"
STREAMING = {"uri": "memory", "data_ttl": 600}
"""What is written is kept for so many seconds, for those who subscribe late."""
_INDEXED_ROWS = 100_000
"""As many are indexed in 0.1 s."""
_FOR_NETWORKS = {
    "CORSMiddleware",
    "CompressionMiddleware",
    "CorrelationIdMiddleware",
    "client_compatibility_check",
    "double_submit_cookie_csrf_protection",
}
"""What Tiled does for requests from elsewhere: a millisecond each."""
_MODELS = [
    schemas.Resource[schemas.NodeAttributes, schemas.ContainerLinks, schemas.ContainerMeta],
    *(
        schemas.Resource[schemas.NodeAttributes, links, schemas.EmptyDict]
        for links in schemas.resource_links_type_by_structure_family.values()
    ),
]
"""What Tiled's answers are made of; pydantic makes models anew that nobody holds, for 1 ms."""
_RUNS = {"name": "CatalogOfBlueskyRuns", "version": "3.0"}
_EXPORTERS = "nanobeam_bluesky.tiled_adapters.exporters"
MEDIA_TYPES = {
    "NanobeamMaps": {
        "application/x-hdf5": f"{_EXPORTERS}:maps_nexus",
        "image/png": f"{_EXPORTERS}:maps_png",
        "image/tiff": f"{_EXPORTERS}:maps_tiff",
        "text/csv": f"{_EXPORTERS}:maps_csv",
        "text/html": f"{_EXPORTERS}:maps_html",
        "text/markdown": f"{_EXPORTERS}:maps_markdown",
    },
    "NanobeamScan": {
        "application/x-hdf5": f"{_EXPORTERS}:scan_nexus",
    },
    "NanobeamMap": {"image/png": f"{_EXPORTERS}:png"},
    "NanobeamPatterns": {"image/png": f"{_EXPORTERS}:png"},
    # what ``run.documents()`` asks for, and Tiled itself does not have
    "BlueskyRun": {"application/json-seq": "bluesky_tiled_plugins.exporters:json_seq_exporter"},
}
"""Of each spec, in what formats it can be had: ``media_types`` of a Tiled configuration."""


def open_catalog(folder: Path | str, *, readable_storage: Iterable[Path | str] = ()) -> Container:
    """Open the catalogue in a folder; it is created where there is none.

    Parameters
    ----------
    folder
        Holds ``catalog.db`` (names and metadata), ``tables.db`` (events), ``arrays/``
        and ``frames/`` (detector files that lie here can be read).
    readable_storage
        Further folders with detector files.

    Returns
    -------
    client
        Client of the root, with the catalogues of runs ``client["raw"]`` and
        ``client["derived"]``, and the views on them ``client["scans"]`` and
        ``client["maps"]``. Tiled runs inside this process; no port is opened.
        ``client.context.close()`` ends it, as does the interpreter's exit.

    Raises
    ------
    NotADirectoryError
        If `folder` is a file.

    Examples
    --------
    >>> run = open_catalog("nanobeam-demo")["derived"].values().last()  # doctest: +SKIP
    """
    alone = {"streaming_cache": None, "metrics": {"prometheus": False}}
    app = build_app(configuration(folder, readable_storage) | alone)
    app.user_middleware = [m for m in app.user_middleware if _name_of(m) not in _FOR_NETWORKS]
    with warnings.catch_warnings():
        # Tiled talks to its own application through starlette's test client
        warnings.filterwarnings("ignore", message=".*httpx.*starlette.testclient")
        return from_context(Context.from_app(app))


def api_key() -> str:
    """Return the key of every Tiled application in this process.

    That of ``TILED_SINGLE_USER_API_KEY``, or 32 random bytes. Tiled's settings are one object
    for all of them; a second key would lock out the first.
    """
    key: str = get_settings().single_user_api_key
    return key


def configuration(
    folder: Path | str,
    readable_storage: Iterable[Path | str] = (),
    *,
    root_map: Mapping[str, str] | None = None,
    compute: bool = False,
) -> dict[str, Any]:
    """Return Tiled's configuration of the catalogue in `folder`, which is created if missing."""
    folder = Path(folder).resolve()
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    catalog = folder / "catalog.db"
    if not catalog.exists():
        # in a thread of its own: there may be a running event loop, as in a notebook
        with ThreadPoolExecutor(1) as executor:
            executor.submit(_create, catalog).result()
    # SQLite and not DuckDB, which is 1.2 to 1.6 times faster but belongs to one
    # process: a scan may be looked at from a second one while it is recorded
    writable = [str(folder / "arrays"), f"sqlite:///{folder / 'tables.db'}"]
    readable = [str(folder / "frames"), *(str(Path(p).resolve()) for p in readable_storage)]
    runs = {"uri": f"sqlite:///{catalog}", "specs": [_RUNS]}
    stored: dict[str, Any] = runs | {"writable_storage": writable, "readable_storage": readable}
    stored["adapters_by_mimetype"] = dict(STACKS)  # Tiled puts classes in it
    viewed = runs | {"readable_storage": [*readable, *writable]}
    mapped: dict[str, Any] = {"root_map": dict(root_map)} if root_map else {}
    computed = {"compute": {"folder": str(folder / "computed")} | mapped} if compute else {}
    trees = (
        ("raw", "catalog", stored | {"mount_node": "raw"}),
        ("derived", "catalog", stored | {"mount_node": "derived"}),
        ("scans", f"{VIEWS}:scans", viewed | {"mount_node": "raw"} | mapped),
        ("maps", f"{VIEWS}:maps", viewed | {"mount_node": "derived"} | computed),
    )
    return {
        "trees": [{"path": f"/{path}", "tree": tree, "args": a} for path, tree, a in trees],
        "create_mount_nodes_if_not_exist": True,
        "expose_raw_assets": False,
        "streaming_cache": STREAMING,
        "media_types": MEDIA_TYPES,
    }


def build_app(config: Mapping[str, Any] | Config) -> Any:
    """Return the Tiled application (ASGI) of a configuration: with a key, its files confined.

    Raises
    ------
    ValueError
        If the configuration is none, lets in anyone, or has a key that cannot stand in a URL.
    """
    config = Config.model_validate(config)
    who = config.authentication
    if who.allow_anonymous_access:
        raise ValueError("authentication.allow_anonymous_access: expected false, or nothing")
    who.allow_anonymous_access = False  # whatever Tiled's environment says
    if not who.providers:
        who.single_user_api_key = who.single_user_api_key or api_key()
        if not re.fullmatch("[a-zA-Z0-9]+", who.single_user_api_key):
            raise ValueError("the API key must be of letters and digits, as it stands in URLs")
    for tree in config.trees:
        context = getattr(tree.tree, "context", None)
        if context is not None:
            context.adapters_by_mimetype = Confined(
                context.adapters_by_mimetype, Roots(folders_of(context))
            )
    app = build_app_from_config(config)
    if set(app.dependency_overrides) == {get_settings}:
        app.dependency_overrides = _Overrides(app.dependency_overrides)
    for error in (OverflowError, ValueError):
        app.add_exception_handler(error, _unfit)
    if any(urlparse((tree.args or {}).get("uri", "")).scheme == "sqlite" for tree in config.trees):
        stored = [uri for tree in config.trees for uri in _writable(tree.args or {})]
        prefix = "sqlite:///"
        tables = {Path(uri.removeprefix(prefix)) for uri in stored if uri.startswith(prefix)}
        app.add_middleware(OneWriter, tables=tables)
    return app


def _writable(arguments: Mapping[str, Any]) -> list[str]:
    """Return the storages that a tree may write to."""
    found = arguments.get("writable_storage") or []
    return [str(item) for item in ([found] if isinstance(found, str) else found)]


def _name_of(middleware: Any) -> str:
    function = middleware.kwargs.get("dispatch", middleware.cls)
    return str(function.__name__)


class _Overrides(dict[Any, Any]):
    """Dependencies that FastAPI need not replace.

    To do so it would read the signatures of all functions behind a route, for each request
    anew: 10 of the 27 ms that one takes. Tiled's one override changes, once and at startup,
    the settings that stand without it too, and returns them.
    """

    def __bool__(self) -> bool:
        return False


class OneWriter:
    """Let requests write one after the other, whoever sends them, and read meanwhile.

    SQLite gives up on a second writer after a while: on a busy disk a raw run lost its stop
    document to the pages of its derived run.

    Parameters
    ----------
    tables
        Databases of events; their tables are indexed when they are new.
    """

    def __init__(self, app: Any, tables: Iterable[Path] = ()) -> None:
        self._app = app
        self._tables = tuple(tables)
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        method = scope.get("method", "GET")
        reads = method in ("GET", "HEAD", "OPTIONS") or (
            method == "POST" and "/full/" in scope["path"]
        )
        if scope["type"] != "http" or reads:
            await self._app(scope, receive, send)
            return
        messages = [await receive()]  # all of it first: a slow client holds up nobody
        while messages[-1].get("more_body"):
            messages.append(await receive())
        coming = iter(messages)

        async def again() -> Any:
            return next(coming, None) or await receive()

        async with self._lock:
            await self._app(scope, again, send)
            if method == "POST" and "/metadata/" in scope["path"]:
                for path in self._tables:
                    _index(path)


async def _unfit(request: Any, error: Exception) -> JSONResponse:
    """Answer 400, and why, to what Tiled fails on: an offset of 1e30, ``image/png;cmap``."""
    logger.warning("%s %s: %s", request.method, request.url.path, error)
    return JSONResponse({"detail": str(error)}, 400)


def _index(path: Path) -> None:
    """Let the events of a run be found without reading those of all others, in new tables.

    Tiled names the index of each table the same, so that SQLite makes that of the first only. To
    index a large one would keep a scan from being recorded for seconds.
    """
    if not path.exists():
        return
    lacking = """
        SELECT name FROM sqlite_master AS found
        WHERE type = 'table' AND name GLOB 'table_[0-9a-f]*' AND NOT EXISTS
            (SELECT 1 FROM sqlite_master WHERE type = 'index' AND tbl_name = found.name)"""
    columns = "(_dataset_id, _partition_id)"
    # where another process writes, the next run's turn comes
    with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=0)) as database:
        for (name,) in database.execute(lacking).fetchall():
            (rows,) = database.execute(f'SELECT coalesce(max(rowid), 0) FROM "{name}"').fetchone()
            if rows < _INDEXED_ROWS:
                database.execute(f'CREATE INDEX IF NOT EXISTS "{name}_rows" ON "{name}" {columns}')


def _create(catalog: Path) -> None:
    """Create an empty catalogue database; whole or not at all.

    Tiled's own ``init_if_not_exists`` does the same in a new interpreter, in five seconds.
    """
    new = catalog.with_suffix(f".{os.getpid()}.new")
    uri = f"sqlite+aiosqlite:///{new}"

    async def create() -> None:
        engine = create_async_engine(uri)
        await initialize_database(engine)
        await engine.dispose()

    asyncio.run(create())
    stamp_head(ALEMBIC_INI_TEMPLATE_PATH, ALEMBIC_DIR, uri)
    os.replace(new, catalog)
