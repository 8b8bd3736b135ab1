"""Writers that record the documents of raw and of derived runs in Tiled."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from bluesky_tiled_plugins import TiledWriter
from bluesky_tiled_plugins.writing.tiled_writer import _RunWriter
from tiled.client.container import Container
from tiled.client.context import Context

__all__ = ["derived_writer", "raw_writer"]

RAW_BATCH = 512
"""Points in a write: one costs some 40 ms, whatever its size."""


def raw_writer(client: Container, *, backup_directory: Path | str | None = None) -> TiledWriter:
    """Return a callback that records raw runs; subscribe it as ``BackgroundSink(raw_writer(…))``.

    One frame an event is recorded as (N, H, W), so that it can be read in flight.

    Parameters
    ----------
    client
        A catalogue of runs, such as ``open_catalog(folder)["raw"]``.
    backup_directory
        Where a run goes, as JSON lines, if Tiled fails during it.
    """
    return _Writer(
        client,
        batch_size=RAW_BATCH,
        patches={"descriptor": _frames_as_stack},
        backup_directory=_text(backup_directory),
    )


def derived_writer(client: Container, *, backup_directory: Path | str | None = None) -> TiledWriter:
    """Return a callback that records derived runs: ``callback.subscribe(derived_writer(…))``.

    Every event page is written when it comes, so that maps can be followed in Tiled
    however slow the scan is.

    Parameters
    ----------
    client
        A catalogue of runs, such as ``open_catalog(folder)["derived"]``.
    backup_directory
        Where a run goes, as JSON lines, if Tiled fails during it.
    """
    # Derived documents follow today's event-model; the default normalizer would copy
    # and validate each of them again, for 0.34 ms a point.
    return DerivedWriter(client, normalizer=None, backup_directory=_text(backup_directory))


_LOCKS: WeakKeyDictionary[Context, threading.Lock] = WeakKeyDictionary()


class _Writer(TiledWriter):
    """TiledWriter that writes while no other one of the same client does.

    SQLite gives up on a second writer after a while: on a busy disk a raw run lost its stop
    document to the pages of its derived run.
    """

    def __init__(self, client: Container, **options: Any) -> None:
        super().__init__(client, **options)
        self._lock = _LOCKS.setdefault(client.context, threading.Lock())

    def __call__(self, name: str, doc: Any) -> None:
        with self._lock:
            super().__call__(name, doc)


class DerivedWriter(_Writer):
    """TiledWriter whose unit of writing is the event page."""

    def _factory(self, name: str, doc: Any) -> tuple[list[Any], list[Any]]:
        (callback,), subfactories = super()._factory(name, doc)
        writer = _PageRunWriter(self.client, batch_size=sys.maxsize)
        if self.backup_directory is None:
            return [writer], subfactories
        callback.primary_callback = writer
        return [callback], subfactories


class _PageRunWriter(_RunWriter):
    def event_page(self, doc: Any) -> None:
        super().event_page(doc)
        stream = self._desc_nodes[doc["descriptor"]]
        rows = self._internal_data_cache[stream.item["id"]]
        self._write_internal_data(rows, desc_node=stream)
        rows.clear()


def _frames_as_stack(descriptor: Any) -> Any:
    """Record frames (1, H, W) of each event as (H, W).

    As (N, 1, H, W) Tiled could not read them while the file grows.
    """
    for key in descriptor["data_keys"].values():
        if "external" in key and len(key["shape"]) == 3 and key["shape"][0] == 1:
            key["shape"] = key["shape"][1:]
    return descriptor


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)
