"""``nanobeam live``: the callback in a process of its own, fed by a transport."""

from __future__ import annotations

import logging
import os
import signal
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from platformdirs import user_data_path
from rich.console import Console

from nanobeam_bluesky.callbacks import BackgroundSink, LiveMaps, NanobeamCallback
from nanobeam_bluesky.documents.processing import Method, MissingModel
from nanobeam_bluesky.geometry import Geometry, GeometryError
from nanobeam_bluesky.models.estimates import DEFAULT_FIT
from nanobeam_bluesky.presets import MissingMetadataError, Preset
from nanobeam_bluesky.transports import Receiver, Source
from nanobeam_bluesky.transports.receiver import without_secrets

if TYPE_CHECKING:
    from tiled.client.container import Container

__all__ = ["LiveOptions", "TiledTarget", "read_root_map", "run_live", "stopped_by_signals"]

logger = logging.getLogger("nanobeam_bluesky")

CLOSE_SECONDS = 30.0
"""How long the end waits for points in work, and for sinks."""


class TiledTarget:
    """Writes derived runs to Tiled; it connects with the first document, and again if it must.

    Parameters
    ----------
    target
        Address of a catalogue of runs with its key, or a folder as of `nanobeam demo`. Of a
        catalogue that has ``derived`` in it, that is taken.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._client: Container | None = None
        self._write: Callable[[str, Any], Any] | None = None

    def __call__(self, name: str, doc: Any) -> None:
        """Write a document."""
        if self._write is None:
            from nanobeam_bluesky.tiled_adapters import derived_writer

            client = self._client = self._connect()
            self._write = derived_writer(client.get("derived", client))
        self._write(name, doc)

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.context.close()

    def _connect(self) -> Container:
        if "://" not in self.target:
            from nanobeam_bluesky.tiled_adapters import open_catalog

            return open_catalog(self.target)
        from tiled.client import from_uri

        return from_uri(self.target)


@dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """What `nanobeam live` was told; exactly one of the first five says where to listen."""

    zmq: str | None = None
    """Outgoing address of a ZMQ proxy, e.g. "127.0.0.1:5568"."""
    nats: str | None = None
    """NATS server, e.g. "nats://127.0.0.1:4222"."""
    kafka: str | None = None
    """Kafka servers, e.g. "127.0.0.1:9092"."""
    tiled: str | None = None
    """Tiled catalogue with its key, e.g. "http://127.0.0.1:8000?api_key=…"."""
    watch: str | None = None
    """Pattern of files, e.g. "/data/**/scan_*.h5"."""
    topic: str | None = None
    """Kafka topic or NATS subject to listen to."""
    geometry: Path | None = None
    """TOML file with what a start document would say; for `watch`."""
    shape: tuple[int, int] | None = None
    """Rows and columns of the scan; for `watch`."""
    snake: bool = False
    """Whether every second row is flown backwards; for `watch`."""
    dataset: str | None = None
    """Frames in an HDF5 file; for `watch`."""
    idle: float = 30.0
    """Seconds without growth after which a file is complete; for `watch`."""
    preset: str = "auto"
    """Where a run's geometry is."""
    root_map: tuple[str, ...] = ()
    """Where folders of the documents are mounted here, e.g. ("/ioc/data=/data",)."""
    analyzer: str = "auto"
    """As of `NanobeamCallback`, as are the next three."""
    fit: tuple[str, ...] = ()
    """What is unknown besides the usual, e.g. ("thickness",)."""
    on_missing_model: str = "universal"
    calibrate: bool = False
    publish_zmq: str | None = None
    """Incoming address of a ZMQ proxy for derived documents."""
    publish_nats: str | None = None
    publish_kafka: str | None = None
    publish_topic: str = "nanobeam.derived"
    """Kafka topic, or first part of the NATS subject, of derived documents."""
    to: str | None = None
    """Tiled catalogue, or folder, for derived runs."""
    spool: Path | None = None
    """Folder where they wait while Tiled is away."""
    maps: bool = False
    """Whether to open a window."""
    metrics: int | None = None
    """Port for Prometheus."""


def run_live(
    options: LiveOptions,
    console: Console,
    *,
    callback: NanobeamCallback | None = None,
    stop: threading.Event | None = None,
) -> bool:
    """Map what a source brings until Ctrl-C, SIGTERM or `stop`.

    Parameters
    ----------
    options
        Where from, where to.
    console
        For what users are to know; the log goes to the standard error.
    callback
        One that is there already; it is not closed. How it works is its own affair, not that
        of the options from `preset` to `calibrate`.
    stop
        Ends it.

    Returns
    -------
    ok
        False if the source failed.

    Raises
    ------
    ValueError
        If the options do not fit together; ImportError if an extra is not installed.
    OSError
        If a server for derived documents, a port or a file is not there.
    """
    where, source = _source(options)
    roots = read_root_map(options.root_map)
    stop = stop or threading.Event()
    failures: list[BaseException] = []
    with ExitStack() as stack:
        publishers = _publishers(options, stack)
        given = callback is not None
        callback = callback or NanobeamCallback(
            cast(Method, options.analyzer),
            preset=options.preset,
            on_missing_model=cast(MissingModel, options.on_missing_model),
            fit=(*DEFAULT_FIT, *options.fit),
            calibrate=options.calibrate,
            root_map=roots,
        )
        if not given:
            stack.callback(callback.close, CLOSE_SECONDS)
        receiver = Receiver(callback)
        live = LiveMaps() if options.maps else None
        for sink in [*publishers, *([live] if live else [])]:
            token = callback.subscribe(sink)
            if given:
                stack.callback(callback.unsubscribe, token)
        if options.metrics is not None:
            from nanobeam_bluesky.callbacks.metrics import serve_metrics

            port = stack.enter_context(serve_metrics(callback, options.metrics))
            _say(console, f"Metrics: http://127.0.0.1:{port}/metrics")
        stack.enter_context(stopped_by_signals(stop))

        def receive() -> None:
            try:
                source.run(receiver, stop, lambda: _say(console, f"Listening to {where}. {_HINT}"))
            except BaseException as error:
                failures.append(error)
            finally:
                stop.set()

        thread = threading.Thread(target=receive, name="documents", daemon=True)
        thread.start()
        if live is not None:
            live.block(stop)
        stop.wait()
        thread.join(CLOSE_SECONDS)
        callback.wait(0 if failures else CLOSE_SECONDS)
        _say(console, f"Ended: {callback.health}")
    if receiver.runs_missed or receiver.unreadable:
        _say(
            console,
            f"Not mapped: {receiver.runs_missed} runs met in their middle, "
            f"{receiver.unreadable} messages that are no documents",
        )
    for error in failures:
        known = isinstance(error, OSError | ValueError)
        logger.error("%s: %s", where, error, exc_info=None if known else error)
    return not failures


_HINT = "Runs are mapped from their start: begin scans after this line."


def home() -> Path:
    """Return the folder of what is kept: ``$NANOBEAM_HOME``, or the platform's data folder."""
    return Path(os.environ.get("NANOBEAM_HOME") or user_data_path("nanobeam"))


def read_root_map(root_map: Sequence[str]) -> dict[str, str]:
    """Read OLD=NEW of an option.

    Raises
    ------
    ValueError
        If one is not like that.
    """
    pairs = [text.rpartition("=") for text in root_map]
    for (old, _, new), text in zip(pairs, root_map, strict=True):
        if not old or not new.startswith("/"):
            raise ValueError(f"--root-map {text}: expected OLD=NEW, such as /ioc/data=/data")
    return {old: new for old, _, new in pairs}


def _source(options: LiveOptions) -> tuple[str, Source]:
    """Return what to listen to, in words and as a source."""
    names = ("zmq", "nats", "kafka", "tiled", "watch")
    given = [name for name in names if getattr(options, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise ValueError(f"give one of --{', --'.join(names)}; found {found}")
    address = without_secrets(str(getattr(options, given[0])))
    where = f"{address} ({given[0]})"
    if options.zmq is not None:
        from nanobeam_bluesky.transports import ZMQSource

        return where, ZMQSource(options.zmq)
    if options.nats is not None:
        from nanobeam_bluesky.transports import NATSSource

        return where, NATSSource(options.nats, *([options.topic] if options.topic else []))
    if options.kafka is not None:
        from nanobeam_bluesky.transports import KafkaSource

        if options.topic is None:
            raise ValueError("--kafka needs --topic, where the beamline publishes its documents")
        return where, KafkaSource(options.kafka, options.topic)
    if options.tiled is not None:
        from nanobeam_bluesky.transports import TiledSource

        return where, TiledSource(options.tiled, partial(_needs_baseline, options.preset))
    if options.geometry is None:
        raise ValueError("--watch needs --geometry film.toml, as there is no start document")
    from nanobeam_bluesky.transports import FileWatch

    values = tomllib.loads(options.geometry.read_text("utf-8"))
    values = values.get("nanobeam", values)
    Geometry.parse(values, where=str(options.geometry))
    return where, FileWatch(
        str(options.watch),
        values,
        shape=options.shape,
        snake=options.snake,
        dataset=options.dataset,
        idle=options.idle,
    )


def _publishers(options: LiveOptions, stack: ExitStack) -> list[Any]:
    """Connect to where derived documents are to be published."""
    publishers: list[Any] = []
    if options.publish_zmq is not None:
        from nanobeam_bluesky.transports import ZMQPublisher

        publishers.append(ZMQPublisher(options.publish_zmq))
    if options.publish_nats is not None:
        from nanobeam_bluesky.transports import NATSPublisher

        publishers.append(NATSPublisher(options.publish_nats, options.publish_topic))
    if options.publish_kafka is not None:
        from nanobeam_bluesky.transports import KafkaPublisher

        publishers.append(KafkaPublisher(options.publish_kafka, options.publish_topic))
    for publisher in publishers:
        stack.callback(publisher.close)
    if options.to is not None:
        target = TiledTarget(options.to)
        stack.callback(target.close)
        spool = options.spool or home() / "spool"
        name = f"Tiled {without_secrets(options.to)}"
        publishers.append(BackgroundSink(target, name=name, spool=spool))
    return publishers


def _needs_baseline(preset: str, start: Mapping[str, Any]) -> bool:
    """Whether the geometry of a run cannot be read from its start document alone."""
    for choice in Preset.choices(preset):
        if choice.matches(start):
            try:
                choice.read_geometry(start)
            except MissingMetadataError:
                return True
            except GeometryError:
                return False  # which the callback will tell
    return False


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end it in order; another Ctrl-C at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def end(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
