"""Tiled: runs as they are recorded, by a subscription to the server.

Documents are made of what Tiled streams: rows of tables become event pages, references to
growing files stream resources and datums, arrays embedded images.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bluesky_tiled_plugins import (
    BlueskyStreamSubscription,
    BlueskyStreamUpdate,
    subscribe_to_streams,
)
from tiled.client import from_uri
from tiled.client.container import Container
from tiled.client.stream import LiveArrayRef, LiveChildCreated, LiveTableData

from nanobeam_bluesky.documents.replay import recorded_descriptor
from nanobeam_bluesky.transports.receiver import Take, without_secrets

__all__ = ["TiledSource"]

logger = logging.getLogger("nanobeam_bluesky")

MESSAGE_BYTES = 256_000_000
"""Largest message; at Tiled's default, 1 MB, an embedded image ends the subscription."""
POLL_SECONDS = 0.5
"""How often open runs are asked for their stop document, which is not streamed."""
CONNECT_SECONDS = 15.0
LATE_SECONDS = 5.0
"""How long what a stop document counts may come after it."""
_COLUMNS = ("seq_num", "time")


class TiledSource:
    """Documents of the runs that are being recorded in a Tiled catalogue.

    The server must stream (a `streaming_cache` in its configuration). What TiledWriter keeps
    back, such as the baseline with its default batch size, comes when it writes it.

    Parameters
    ----------
    target
        Address of a catalogue of runs, with its key, or a client of one; of a catalogue
        that has ``raw`` in it, that is taken.
    needs_baseline
        Whether a start document lacks what only the baseline can say: frames of such runs
        wait for it.
    """

    def __init__(
        self,
        target: str | Container,
        needs_baseline: Callable[[Mapping[str, Any]], bool] = lambda start: False,
    ) -> None:
        self._target = target
        self._needs_baseline = needs_baseline
        self._lock = threading.Lock()  # updates of several nodes come in several threads
        self._runs: dict[str, _Run] = {}
        self._began = 0.0

    def run(self, take: Take, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Hand documents to `take` until `stop` is set."""
        own = isinstance(self._target, str)
        client: Any = _connected(self._target) if isinstance(self._target, str) else self._target
        catalog = client.get("raw", client)
        self._began = time.time()

        def update(item: BlueskyStreamUpdate) -> None:
            try:
                with self._lock:
                    self._update(catalog, item, take)
            except Exception:
                logger.exception("run %s: an update could not be understood", item.run_uid[:8])

        def is_open(child: LiveChildCreated) -> bool:
            start = child.metadata.get("start", {})
            if start.get("original_run_uid") is not None:
                return False  # a derived run
            return start.get("time", 0) > self._began or not catalog[child.key].metadata.get("stop")

        try:
            with _begun(
                lambda: subscribe_to_streams(
                    catalog, update, streams=None, run_filter=is_open, max_size=MESSAGE_BYTES
                ),
                catalog.uri,
            ):
                ready()
                while not stop.wait(POLL_SECONDS):
                    self._close_stopped(catalog, take)
        finally:
            if own:
                client.context.close()

    def _update(self, catalog: Container, item: BlueskyStreamUpdate, take: Take) -> None:
        if item.run_uid not in self._runs:
            node = catalog[item.run_uid]
            start = dict(node.metadata["start"])
            self._runs[item.run_uid] = _Run(node, self._needs_baseline(start))
            take("start", start)
        self._runs[item.run_uid].update(item, take)

    def _close_stopped(self, catalog: Container, take: Take) -> None:
        for uid in list(self._runs):
            try:
                stop = catalog[uid].metadata.get("stop")
            except Exception as error:  # the server is away for a while
                logger.warning("run %s: %s", uid[:8], error)
                return
            if stop is None:
                continue
            with self._lock:
                run = self._runs[uid]
                if not run.is_complete(stop):
                    continue
                run.release(take)
                take("stop", dict(stop))
                del self._runs[uid]


def _connected(uri: str) -> Container:
    try:
        return from_uri(uri)
    except Exception as error:  # of several libraries
        raise ConnectionError(f"no Tiled at {without_secrets(uri)}: {error}") from error


def _begun(
    subscribe: Callable[[], BlueskyStreamSubscription], uri: str
) -> BlueskyStreamSubscription:
    """Begin a subscription; Tiled's client waits for ever where the server does not stream."""
    begun: list[BlueskyStreamSubscription] = []
    thread = threading.Thread(target=lambda: begun.append(subscribe()), daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not begun:
        raise ConnectionError(
            f"cannot subscribe to {uri} in {CONNECT_SECONDS:g} s: expected a server that streams, "
            "with a streaming_cache in its configuration"
        )
    return begun[0]


@dataclass
class _Run:
    node: Container
    """Of the run in Tiled."""
    waits: bool
    """Whether other streams wait for the baseline."""
    descriptors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the stream's name."""
    resources: dict[tuple[str, str], str] = field(default_factory=dict)
    """(stream, key) → uid of its stream resource; "" where it cannot be read."""
    held: list[tuple[str, Any]] = field(default_factory=list)
    points: dict[str, int] = field(default_factory=dict)
    """Stream → the highest point so far."""
    stopped: float = 0.0
    """When the stop document was seen."""

    def update(self, item: BlueskyStreamUpdate, take: Take) -> None:
        documents = list(self._documents(item))
        if item.stream_name == "baseline":
            for document in documents:
                take(*document)
            self.waits = False
            self.release(take)
        elif self.waits:
            self.held += documents
        else:
            for document in documents:
                take(*document)

    def release(self, take: Take) -> None:
        """Hand out what has waited."""
        held, self.held = self.held, []
        for document in held:
            take(*document)

    def is_complete(self, stop: Mapping[str, Any]) -> bool:
        """Whether all has come that the stop document counts, or will not come any more."""
        now = time.monotonic()
        self.stopped = self.stopped or now
        counts = stop.get("num_events") or {}
        there = all(self.points.get(name, 0) >= n for name, n in counts.items())
        return there or now - self.stopped > LATE_SECONDS

    def _documents(self, item: BlueskyStreamUpdate) -> Any:
        stream = item.stream_name
        if stream not in self.descriptors:
            self.descriptors[stream] = recorded_descriptor(stream, self.node[stream].metadata) | {
                "run_start": self.node.item["id"]
            }
            yield "descriptor", self.descriptors[stream]
        descriptor = self.descriptors[stream]
        update = item.update
        if isinstance(update, LiveTableData):
            table = update.data()
            columns = {name: table[name].tolist() for name in table.columns}
            seq_num, times = (columns.pop(name) for name in _COLUMNS)
            keys = [key for key in columns if key in descriptor["data_keys"]]
            yield self._page(stream, seq_num, times, {key: columns[key] for key in keys})
            return
        (key,) = item.data_keys
        if isinstance(update, LiveArrayRef):
            yield from self._stored(stream, key, update)
            return
        values = update.data()
        first = update.offset[0] if update.offset else 0
        numbers = list(range(first + 1, first + len(values) + 1))
        yield self._page(stream, numbers, [time.time()] * len(numbers), {key: list(values)})

    def _page(
        self, stream: str, seq_num: list[int], times: list[float], data: dict[str, list[Any]]
    ) -> tuple[str, dict[str, Any]]:
        self._reached(stream, max(seq_num, default=0))
        return "event_page", {
            "descriptor": self.descriptors[stream]["uid"],
            "uid": [str(uuid.uuid4()) for _ in seq_num],
            "seq_num": [int(n) for n in seq_num],
            "time": times,
            "data": data,
            "timestamps": {key: times for key in data},
            "filled": {},
        }

    def _stored(self, stream: str, key: str, update: LiveArrayRef) -> Any:
        descriptor = self.descriptors[stream]
        if (stream, key) not in self.resources:
            self.resources[stream, key] = ""
            source = update.data_source
            if len(source.assets) != 1:
                logger.warning(
                    "run %s: %r lies in %d files, of which a subscription does not tell enough",
                    *(self.node.item["id"][:8], key, len(source.assets)),
                )
                return
            self.resources[stream, key] = uid = str(uuid.uuid4())
            yield (
                "stream_resource",
                {
                    "uid": uid,
                    "run_start": self.node.item["id"],
                    "data_key": key,
                    "mimetype": source.mimetype,
                    "uri": source.assets[0].data_uri,
                    "parameters": dict(source.parameters),
                },
            )
        uid = self.resources[stream, key]
        if not uid:
            return
        rows = update.shape[0] if update.patch is None else update.patch.shape[0]
        row = 0 if update.patch is None else update.patch.offset[0]
        shape = descriptor["data_keys"][key].get("shape") or []
        per_point = int(shape[0]) if len(shape) == len(update.shape) else 1
        first, count = row // per_point, rows // per_point
        if not count:
            return
        self._reached(stream, first + count)
        yield (
            "stream_datum",
            {
                "uid": f"{uid}/{first}",
                "stream_resource": uid,
                "descriptor": descriptor["uid"],
                "indices": {"start": first, "stop": first + count},
                "seq_nums": {"start": first + 1, "stop": first + count + 1},
            },
        )

    def _reached(self, stream: str, point: int) -> None:
        self.points[stream] = max(self.points.get(stream, 0), int(point))
