"""Writers that record the documents of raw and of derived runs in Tiled."""

from __future__ import annotations

import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pyarrow
from bluesky_tiled_plugins import TiledWriter
from bluesky_tiled_plugins.writing.tiled_writer import _RunWriter
from tiled.client.container import Container
from tiled.client.utils import ClientError, retry_context

from nanobeam_bluesky.tiled_adapters import stacks  # noqa: F401  tells TiledWriter of its formats

__all__ = ["derived_writer", "raw_writer"]

RAW_BATCH = 512
"""Points in a write: one costs some 40 ms, whatever its size."""

_TABLE = "internal"
"""Where TiledWriter puts the events of a stream."""


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
    return TiledWriter(
        client,
        batch_size=RAW_BATCH,
        patches={"descriptor": _frames_as_stack},
        backup_directory=None if backup_directory is None else str(backup_directory),
    )


def whole_run_writer(client: Container) -> TiledWriter:
    """Return a callback that records raw runs that are complete, each event page at once.

    For documents of today's event-model, one frame an event as (rows, columns).
    """
    return DerivedWriter(client, normalizer=None)


def derived_writer(client: Container) -> TiledWriter:
    """Return a callback that records derived runs: ``callback.subscribe(derived_writer(…))``.

    Every event page is written when it comes, so that maps can be followed in Tiled
    however slow the scan is. A run whose start document comes again is continued, nothing
    is written twice: ``BackgroundSink(derived_writer(…), spool=folder)`` survives a dead server.

    Parameters
    ----------
    client
        A catalogue of runs, such as ``open_catalog(folder)["derived"]``.
    """
    # Derived documents follow today's event-model; the default normalizer would copy
    # and validate each of them again, for 0.34 ms a point.
    return DerivedWriter(client, normalizer=None)


class DerivedWriter(TiledWriter):
    """TiledWriter whose unit of writing is the event page, and that knows what it has.

    A run whose start document comes again is continued: what is in Tiled already is not
    written a second time, whether this process or another one wrote it.
    """

    def __init__(self, client: Container, **options: Any) -> None:
        # each run would ask for these otherwise
        super().__init__(client.include_data_sources(), **options)
        self._runs: dict[str, _PageRunWriter] = {}
        self._run_of: dict[str, str] = {}  # descriptor → run

    def __call__(self, name: str, doc: Any) -> None:
        # not by event-model's RunRouter: to that, a second start document is an error
        if name == "start":
            run = doc["uid"]
            self._runs[run] = _PageRunWriter(self.client, batch_size=sys.maxsize)
        else:
            run = doc["run_start"] if "run_start" in doc else self._run_of[doc["descriptor"]]
            if name == "descriptor":
                self._run_of[doc["uid"]] = run
        self._runs[run](name, doc)
        if name == "stop":
            del self._runs[run]
            self._run_of = {uid: of for uid, of in self._run_of.items() if of != run}


class _PageRunWriter(_RunWriter):
    _resumed = False
    """Whether some of the run was there before."""

    def start(self, doc: Any) -> None:
        try:
            super().start(doc)
        except ClientError as error:
            if error.response.status_code != HTTPStatus.CONFLICT:
                raise
            self.root_node = self.client[doc["uid"]]
            self._resumed = True

    def descriptor(self, doc: Any) -> None:
        name = doc["name"]
        if self._resumed and name in self.root_node:
            stream = self._desc_nodes[name] = self._desc_nodes[doc["uid"]] = self.root_node[
                name
            ].base
            self.data_keys.update(doc["data_keys"])
            if _TABLE in stream:
                self._internal_tables[name] = stream[_TABLE]
        else:
            super().descriptor(doc)

    def event_page(self, doc: Any) -> None:
        """Write a page, column by column: the numbers of derived runs need no rows between."""
        stream = self._desc_nodes[doc["descriptor"]]
        name = stream.item["id"]
        columns = {"seq_num": doc["seq_num"], "time": doc["time"]} | doc["data"]
        columns |= {f"ts_{key}": values for key, values in doc["timestamps"].items()}
        arrays = {id(values): values for values in columns.values()}  # many are the same list
        arrays = {key: pyarrow.array(values) for key, values in arrays.items()}
        table = pyarrow.table({name: arrays[id(values)] for name, values in columns.items()})
        if name not in self._internal_tables:
            self._internal_tables[name] = stream.create_appendable_table(
                schema=table.schema,
                key=_TABLE,
                metadata={k: v for k, v in self.data_keys.items() if k in doc["data"]},
                access_tags=self.access_tags,
            )
        elif self._resumed:
            table = _missing(table, self._internal_tables[name])
        if table.num_rows:
            self._append_with_retry(self._internal_tables[name], table, name)

    def _append_with_retry(self, df_client: Any, table: Any, desc_name: str) -> None:
        """Append rows; once, also where the server has done so and not said it."""
        try:
            df_client.append_partition(0, table)
        except httpx.HTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status < 500:
                raise
            for attempt in retry_context():
                with attempt:
                    table = _missing(table, df_client)
                    if table.num_rows:
                        df_client.append_partition(0, table)

    def _close_stream_tree(self) -> None:
        if not hasattr(self.client.context.http_client, "app"):  # one of this process has no others
            super()._close_stream_tree()

    def stop(self, doc: Any) -> None:
        if self._resumed and self.root_node.metadata.get("stop"):
            return
        super().stop(doc)


def _missing(rows: pyarrow.Table, table: Any) -> pyarrow.Table:
    """Return the rows that a table does not have; a point comes again with another time."""
    there = table.read(["seq_num", "time"])
    known = set(zip(there["seq_num"].tolist(), there["time"].tolist(), strict=True))
    wanted = zip(rows["seq_num"].to_pylist(), rows["time"].to_pylist(), strict=True)
    return rows.filter(pyarrow.array([row not in known for row in wanted], pyarrow.bool_()))


def _frames_as_stack(descriptor: Any) -> Any:
    """Record frames (1, H, W) of each event as (H, W).

    As (N, 1, H, W) Tiled could not read them while the file grows.
    """
    for key in descriptor["data_keys"].values():
        if "external" in key and len(key["shape"]) == 3 and key["shape"][0] == 1:
            key["shape"] = key["shape"][1:]
    return descriptor
