"""`NanobeamCallback`: documents of a scan in, documents of its derived run out."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanobeam_bluesky.callbacks.sink import BackgroundSink
from nanobeam_bluesky.callbacks.worker_client import WorkerClient
from nanobeam_bluesky.documents.pipeline import RunPipeline, Tally
from nanobeam_bluesky.documents.processing import AnalyzerChoice, Method, MissingModel
from nanobeam_bluesky.geometry import ROI
from nanobeam_bluesky.models.estimates import DEFAULT_FIT
from nanobeam_bluesky.presets import Preset, unit_registry

__all__ = ["Health", "NanobeamCallback"]

logger = logging.getLogger("nanobeam_bluesky")

PAUSE_SECONDS = 0.02
"""Documents are handled in bursts: waking for each would take the interpreter lock from
the RunEngine hundreds of times a second."""
EXIT_SECONDS = 30.0
"""How long the interpreter's exit waits for derived runs whose raw run has stopped."""

_MARK = object()

Sink = Callable[[str, dict[str, Any]], Any]


@dataclass(frozen=True)
class Health:
    """What a callback has done so far."""

    runs: int
    """Raw runs that matched the preset."""
    points_seen: int
    """Distinct points announced by documents."""
    points_analysed: int
    """Points with an estimate, flagged or not."""
    points_flagged: int
    """Those with any flag."""
    points_pending: int
    """Points that wait for their positions, their frames or the worker."""
    lag_seconds: float
    """How long the oldest of them has waited."""
    queue_bytes: int
    """Embedded frames in memory."""
    documents_pending: int
    """Documents not looked at yet."""
    worker_pid: int | None
    """Process id of the worker; None while there is none."""
    worker_ready: bool
    """Whether it is warm: it has imported and compiled what it needs, some 3 s after its start."""
    worker_restarts: int
    """How often the worker process had to be started again."""
    spooled: int
    """Derived documents that wait on disk for a sink (`BackgroundSink`)."""
    errors: int
    """Things that went wrong."""
    last_error: str
    """The last of them."""

    def __str__(self) -> str:
        """One line, for the log."""
        return ", ".join(
            f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in asdict(self).items()
            if value not in ("", None)
        )


class NanobeamCallback:
    """Analyse SXDM scans while they fly: ``RE.subscribe(NanobeamCallback())``.

    Documents are taken in the RunEngine's thread in about a microsecond each; a thread
    of the callback finds frames and positions, a worker process reads and analyses
    them, and the documents of the derived run go to whatever is subscribed here.

    Parameters
    ----------
    analyzer
        "auto" or "refine" (maximum likelihood, started by a network), "network" or
        "correlation" (these alone).
    preset
        Where a run's geometry is: the name of a shipped preset, a path, a `Preset`, or "auto",
        the first shipped one that matches the run (`Preset.choices`).
        Runs that it does not match are ignored.
    roi
        Region of interest instead of the geometry's own.
    on_missing_model
        Where no network was trained for the geometry: "universal" takes the shipped one for
        every geometry, or a library outside its envelope; "fit" starts from a library; "train"
        is as "universal", and trains one in a background process that gives way to everything
        else and ends with this callback, for the next scan; "skip" closes the derived run with
        the reason.
    fit
        What is unknown: strain, tilts, scale and background, or with "thickness" and "blur".
    calibrate
        Whether the first 256 points correct orientation, bad pixels, blur and thickness
        of the geometry (`models.calibrate`); the derived run begins after that.
    device
        Torch device of the worker.
    root_map
        Where folders of the documents are mounted here, e.g. {"/ioc/data": "/data",
        "//ioc1/data": "/data"} for paths and for URIs of another host.

    Notes
    -----
    Nothing that goes wrong reaches the RunEngine: it is logged, counted in `health` and
    written into the derived run's stop document.
    """

    def __init__(
        self,
        analyzer: Method = "auto",
        *,
        preset: Preset | str | Path = "default",
        roi: ROI | None = None,
        on_missing_model: MissingModel = "universal",
        fit: Sequence[str] = DEFAULT_FIT,
        calibrate: bool = False,
        device: str = "auto",
        root_map: Mapping[str, str] | None = None,
    ) -> None:
        self._presets = Preset.choices(preset)
        self._choice = AnalyzerChoice(analyzer, on_missing_model, tuple(fit), calibrate, device)
        self._roi = roi
        self._root_map = dict(root_map or {})
        self._tally = Tally()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sinks: dict[int, BackgroundSink] = {}
        self._next_token = 0
        self._runs: dict[str, RunPipeline] = {}  # by raw uid
        self._descriptors: dict[str, str] = {}  # descriptor or resource uid → raw uid
        self._closing = threading.Event()
        self._worker = WorkerClient(self._queue.put)
        self._thread = threading.Thread(target=self._work, name="nanobeam-callback", daemon=True)
        self._thread.start()
        self._close_at_exit()

    # ------------------------------------------------------------ the RunEngine's

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Take a document; never blocks, never raises; ignored once closed."""
        if not self._closing.is_set():
            self._queue.put((name, doc))

    # --------------------------------------------------------------- the user's

    def subscribe(self, sink: Sink, name: str = "all") -> int:
        """Send the derived run's documents to `sink`, behind its own thread.

        Parameters
        ----------
        sink
            Any callable of (name, document), such as a TiledWriter or a `LiveMaps`.
        name
            Kind of document; "all" for every one.

        Returns
        -------
        token
            For `unsubscribe`.
        """
        chosen = sink if name == "all" else _only(sink, name)
        wrapped = chosen if isinstance(chosen, BackgroundSink) else BackgroundSink(chosen)
        self._next_token += 1
        self._sinks[self._next_token] = wrapped
        self._close_at_exit()
        return self._next_token

    def unsubscribe(self, token: int) -> None:
        """Stop sending to the sink with this token."""
        self._sinks.pop(token).close()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every derived run is closed and every sink has its documents.

        Returns
        -------
        done
            False if `timeout` seconds passed before.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        while self._thread.is_alive():
            handled = threading.Event()
            self._queue.put((_MARK, handled))  # behind every document so far
            while not handled.wait(min(0.2, left())):
                if not self._thread.is_alive():  # closed meanwhile
                    break
                if not left():
                    return False
            if not self._runs:
                break
            time.sleep(PAUSE_SECONDS)
        return all(
            sink.wait(None if deadline == math.inf else left())
            for sink in list(self._sinks.values())
        )

    def close(self, timeout: float | None = 10.0) -> None:
        """Finish what has stopped, close what has not with the reason, end the worker."""
        if self._closing.is_set():
            return
        if any(run.stopped for run in list(self._runs.values())) or not self._queue.empty():
            self.wait(timeout)
        self._closing.set()
        self._queue.put((_MARK, threading.Event()))
        self._thread.join(timeout)
        for sink in self._sinks.values():
            sink.close(timeout)

    @property
    def health(self) -> Health:
        """Counts so far."""
        runs = list(self._runs.values())
        sinks = [sink.health for sink in list(self._sinks.values())]
        return Health(
            runs=self._tally.runs,
            points_seen=self._tally.points_seen,
            points_analysed=self._tally.points_analysed,
            points_flagged=self._tally.points_flagged,
            points_pending=sum(run.points_pending for run in runs),
            lag_seconds=max((run.lag_seconds for run in runs), default=0.0),
            queue_bytes=sum(run.queue_bytes for run in runs),
            documents_pending=self._queue.qsize(),
            worker_pid=self._worker.pid,
            worker_ready=self._worker.ready,
            worker_restarts=self._worker.restarts,
            spooled=sum(s.spooled for s in sinks),
            errors=self._tally.errors + sum(s.errors for s in sinks),
            last_error=self._tally.last_error
            or next((s.last_error for s in sinks if s.last_error), ""),
        )

    def _close_at_exit(self) -> None:
        # What was registered last is called first: before the sinks give up, and before
        # an embedded Tiled server, which registers itself here too, ends.
        threading._register_atexit(_close, weakref.ref(self))  # type: ignore[attr-defined]

    # -------------------------------------------------------- the thread's own

    def _work(self) -> None:
        unit_registry()  # now, not while a scan waits for the interpreter lock
        while not self._closing.is_set():
            try:
                self._turn()
            except Exception as error:
                logger.exception("the callback's thread goes on after an error")
                self._count(error)
            time.sleep(PAUSE_SECONDS)
        for run in list(self._runs.values()):
            self._guarded(
                run, partial(run.fail, "the callback was closed before the run had stopped")
            )
        self._worker.shutdown()

    def _turn(self) -> None:
        """Take what has come, and give every run its turn."""
        with contextlib.suppress(queue.Empty):
            self._take(self._queue.get(timeout=0.05 if self._runs else None))
            while True:
                self._take(self._queue.get_nowait())
        for run in list(self._runs.values()):
            self._guarded(run, run.poll)
        self._forget_closed()

    def _take(self, item: Any) -> None:
        if len(item) == 3:
            self._worker.answer(item)
            return
        name, doc = item
        if name is _MARK:
            doc.set()
            return
        try:
            run = self._run_of(name, doc)
        except Exception as error:
            logger.exception("a %s document could not be understood", name)
            self._count(error)
            return
        if run is not None:
            self._guarded(run, lambda: run.document(name, doc))

    def _run_of(self, name: str, doc: Mapping[str, Any]) -> RunPipeline | None:
        """Return the pipeline a document is for; starts one where it should."""
        if name == "start":
            preset = next((p for p in self._presets if p.matches(doc)), None)
            if preset is not None:
                self._begin(doc, preset)
            return None
        if name in ("descriptor", "stop", "stream_resource", "resource"):
            raw = doc.get("run_start")
            if raw is None and name == "resource":  # older ones do not say
                raw = self._only_run()
            if raw in self._runs and name != "stop":
                self._descriptors[doc["uid"]] = raw
        elif name in ("stream_datum", "event", "event_page"):
            raw = self._descriptors.get(doc["descriptor"])
            if raw is None and name == "stream_datum":  # before its descriptor
                raw = self._descriptors.get(doc["stream_resource"])
        elif name in ("datum", "datum_page", "bulk_datum"):
            raw = self._descriptors.get(doc["resource"]) or self._only_run()
        else:
            return None
        return self._runs.get(raw) if raw is not None else None

    def _only_run(self) -> str | None:
        """Uid of the run that flies, if there is one: for documents that do not say theirs."""
        flying = [uid for uid, run in self._runs.items() if not run.stopped]
        return flying[0] if len(flying) == 1 else None

    def _begin(self, start: Mapping[str, Any], preset: Preset) -> None:
        uid = start["uid"]
        if uid in self._runs:
            self._runs.pop(uid).fail("the run started again without a stop document")
        run = RunPipeline(
            start,
            preset,
            self._worker,
            self._emit,
            choice=self._choice,
            roi=self._roi,
            tally=self._tally,
            root_map=self._root_map,
        )
        if not run.closed:
            self._runs[uid] = run

    def _guarded(self, run: RunPipeline, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            logger.exception("run %s: the analysis stopped", str(run.start["uid"])[:8])
            with contextlib.suppress(Exception):
                run.fail(f"internal error: {type(error).__name__}: {error}")
            run.closed = True

    def _forget_closed(self) -> None:
        for uid in [uid for uid, run in self._runs.items() if run.closed]:
            del self._runs[uid]
            logger.info("run %s is done; so far: %s", str(uid)[:8], self.health)
            for key in [k for k, raw in self._descriptors.items() if raw == uid]:
                del self._descriptors[key]

    def _count(self, error: Exception) -> None:
        self._tally.errors += 1
        self._tally.last_error = f"{type(error).__name__}: {error}"

    def _emit(self, name: str, doc: dict[str, Any]) -> None:
        for sink in list(self._sinks.values()):
            sink(name, doc)


def _close(reference: weakref.ref[NanobeamCallback]) -> None:
    callback = reference()
    if callback is not None:
        callback.close(EXIT_SECONDS)


def _only(sink: Sink, wanted: str) -> Sink:
    return lambda name, doc: sink(name, doc) if name == wanted else None
