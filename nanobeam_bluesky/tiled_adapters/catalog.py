"""The embedded catalogue: a folder with raw and derived runs, read by Tiled in process."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import create_async_engine
from tiled.alembic_utils import stamp_head
from tiled.catalog.alembic_constants import ALEMBIC_DIR, ALEMBIC_INI_TEMPLATE_PATH
from tiled.catalog.core import initialize_database
from tiled.client import from_context
from tiled.client.container import Container
from tiled.client.context import Context
from tiled.server.app import build_app_from_config
from tiled.server.settings import get_settings

__all__ = ["MEDIA_TYPES", "api_key", "build_app", "open_catalog"]

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
    app = build_app(folder, readable_storage)
    with warnings.catch_warnings():
        # Tiled talks to its own application through starlette's test client
        warnings.filterwarnings("ignore", message=".*httpx.*starlette.testclient")
        return from_context(Context.from_app(app))


def api_key() -> str:
    """Return the key of every Tiled application in this process: 32 random bytes.

    Tiled's settings are one object for all of them; a second key would lock out the first.
    """
    key: str = get_settings().single_user_api_key
    return key


def build_app(folder: Path | str, readable_storage: Iterable[Path | str]) -> Any:
    """Return the Tiled application (ASGI) of the catalogue in `folder`."""
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
    readable = [str(folder / "frames"), *(str(Path(p)) for p in readable_storage)]
    runs = {"uri": f"sqlite:///{catalog}", "specs": [_RUNS]}
    stored = runs | {"writable_storage": writable, "readable_storage": readable}
    viewed = runs | {"readable_storage": [*readable, *writable]}
    views = "nanobeam_bluesky.tiled_adapters.views"
    trees = (
        ("raw", "catalog", stored | {"mount_node": "raw"}),
        ("derived", "catalog", stored | {"mount_node": "derived"}),
        ("scans", f"{views}:scans", viewed | {"mount_node": "raw"}),
        ("maps", f"{views}:maps", viewed | {"mount_node": "derived"}),
    )
    app = build_app_from_config(
        {
            "trees": [{"path": f"/{path}", "tree": tree, "args": a} for path, tree, a in trees],
            "create_mount_nodes_if_not_exist": True,
            "authentication": {"single_user_api_key": api_key()},
            "expose_raw_assets": False,
            "media_types": MEDIA_TYPES,
        }
    )
    app.add_exception_handler(ValueError, _garbled_media_type)
    return app


async def _garbled_media_type(request: Any, error: Exception) -> JSONResponse:
    """Answer 400 to ``image/png;cmap``, which Tiled cannot parse."""
    if "mimetype parameter" not in str(error):
        raise error
    return JSONResponse({"detail": str(error)}, 400)


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
