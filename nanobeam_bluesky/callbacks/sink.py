"""`BackgroundSink`: a document callback behind its own thread and queue."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["BackgroundSink", "SinkHealth"]

logger = logging.getLogger("nanobeam_bluesky")

Callback = Callable[[str, Any], Any]

EXIT_SECONDS = 10.0
"""How long the interpreter's exit waits for the documents that a sink still holds."""


@dataclass(frozen=True)
class SinkHealth:
    """What a sink has done so far; exact after `BackgroundSink.wait`."""

    delivered: int
    """Documents that the callback took."""
    pending: int
    """Documents that wait, the one in hand included."""
    skipped: int
    """Documents that the callback was not given: the rest of a run in which it failed,
    and what came after `BackgroundSink.close`."""
    errors: int
    """Documents on which the callback raised."""
    last_error: str
    """The last of these errors, e.g. "OSError: disk full"; empty if there was none."""


class BackgroundSink:
    """Run a slow document callback beside the RunEngine: ``RE.subscribe(BackgroundSink(writer))``.

    Handing a document in takes about a microsecond; it never blocks and never raises.
    One thread calls the callback, one document after the other, in order.

    Parameters
    ----------
    callback
        Any callable of (name, document), such as a TiledWriter. It is held strongly; a
        bound method will do.
    name
        For the log and the thread; the callback's own name if absent.

    Notes
    -----
    The queue holds references, without a limit: `health` says how many. Documents are
    shared with all other subscribers, so the callback must not change them.

    A run in which the callback failed is not given to it any further, its stop document
    included: what is half written must not look complete, and a dead server can cost 45 s
    a document. The error is logged with its cause, once a run, and counted; the next run
    is tried afresh.

    When the interpreter exits, what is still queued has `EXIT_SECONDS` to be delivered.
    """

    def __init__(self, callback: Callback, *, name: str | None = None) -> None:
        self._callback = callback
        self.name = name or getattr(callback, "__qualname__", type(callback).__name__)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._marks: set[threading.Event] = set()  # in the queue, beside documents
        self._end: threading.Event | None = None
        # all below is the thread's; others only read
        self._run_of: dict[str, str] = {}  # descriptor or resource uid → run uid
        self._failed_runs: set[str] = set()
        self._busy = 0
        self._delivered = 0
        self._skipped = 0
        self._errors = 0
        self._last_error = ""
        self._refused = 0
        self._thread = threading.Thread(target=self._work, name=f"sink {self.name}", daemon=True)
        self._thread.start()
        # Not atexit: that runs after an embedded Tiled server was shut down, which
        # registers itself here as well. The last registered is the first called.
        threading._register_atexit(_flush_at_exit, weakref.ref(self))  # type: ignore[attr-defined]

    def __call__(self, name: str, doc: Any) -> None:
        """Queue a document; any thread may call."""
        if self._end is not None:
            self._refused += 1
            if self._refused == 1:
                logger.warning("sink %s is closed and takes no more documents", self.name)
        else:
            self._queue.put((name, doc))

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every document handed in so far has had its turn.

        Returns
        -------
        done
            False if `timeout` seconds passed before.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        reached = threading.Event()
        self._mark(reached)
        while not reached.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
            if not self._thread.is_alive():  # closed meanwhile, by another thread
                return True
            if time.monotonic() >= deadline:
                return False
        return True

    def close(self, timeout: float | None = None) -> bool:
        """Deliver what is queued, then end the thread; may be called again.

        Returns
        -------
        done
            False if `timeout` seconds passed before; the thread goes on meanwhile.
        """
        if self._end is None:
            self._end = threading.Event()
            self._mark(self._end)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def health(self) -> SinkHealth:
        """Counts so far."""
        return SinkHealth(
            delivered=self._delivered,
            pending=max(0, self._queue.qsize() - len(self._marks)) + self._busy,
            skipped=self._skipped + self._refused,
            errors=self._errors,
            last_error=self._last_error,
        )

    def _mark(self, event: threading.Event) -> None:
        """Have `event` set when all documents handed in so far have had their turn."""
        self._marks.add(event)
        self._queue.put(event)

    # ------------------------------------------------------------ the thread's own

    def _work(self) -> None:
        while self._end is None or not self._end.is_set():
            item = self._queue.get()
            if isinstance(item, threading.Event):
                self._marks.discard(item)
                item.set()
            else:
                self._busy = 1
                self._deliver(*item)
                self._busy = 0
            del item  # a thread that waits must not hold the last document

    def _deliver(self, name: str, doc: Any) -> None:
        run: str | None = None
        try:
            run = self._find_run(name, doc)
            if run in self._failed_runs:
                self._skipped += 1
            else:
                self._callback(name, doc)
                self._delivered += 1
        except BaseException as error:  # the thread must live on, whatever it was
            self._errors += 1
            self._last_error = f"{type(error).__name__}: {error}"
            rest = ""
            if run is not None:
                self._failed_runs.add(run)
                rest = f"; the rest of run {run[:8]} is not given to it"
            logger.exception("%s failed on a %s document%s", self.name, name, rest)
        if name == "stop" and run is not None:
            self._failed_runs.discard(run)
            self._run_of = {uid: of for uid, of in self._run_of.items() if of != run}

    def _find_run(self, name: str, doc: Any) -> str | None:
        """Return the uid of the document's run, None where it cannot be told."""
        if name == "start":
            return str(doc["uid"])
        if "run_start" in doc:  # descriptor, resource, stream_resource, stop
            run = str(doc["run_start"])
            if name != "stop":
                self._run_of[doc["uid"]] = run
            return run
        return self._run_of.get(doc.get("descriptor") or doc.get("resource"))


def _flush_at_exit(reference: weakref.ref[BackgroundSink]) -> None:
    sink = reference()
    if sink is not None and not sink.wait(EXIT_SECONDS):
        logger.warning(
            "sink %s: %d documents were not delivered before the interpreter's exit",
            sink.name,
            sink.health.pending,
        )
