"""`BackgroundSink`: a document callback behind its own thread and queue."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanobeam_bluesky.callbacks.spool import Spool

__all__ = ["BackgroundSink", "SinkHealth"]

logger = logging.getLogger("nanobeam_bluesky")

Callback = Callable[[str, Any], Any]

_HEAD = frozenset({"start", "descriptor", "resource", "stream_resource"})
"""What later documents of a run refer to."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""How long after a failure the spool is tried again; the last one for ever."""
SLOW_DOCUMENTS = 256
"""With so many in memory, a callback that has a spool is too slow: they go to disk."""
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
    spooled: int = 0
    """Documents that wait on disk."""


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
    spool
        Folder, for one process at a time, for what the callback could not take because a
        server was down, slow or at fault; it is delivered afterwards, also by the next
        process that has this folder.

    Raises
    ------
    BlockingIOError
        If another process has the spool's folder.

    Notes
    -----
    The queue holds references, without a limit: `health` says how many. Documents are
    shared with all other subscribers, so the callback must not change them.

    A run in which the callback failed is not given to it any further, its stop document
    included: what is half written must not look complete, and a dead server can cost 45 s
    a document. The error is logged with its cause, once a run, and counted; the next run
    is tried afresh.

    With a spool, a run in which the callback failed goes to disk, and so do all later ones,
    so that their order stays. It is given to the callback again from its start document,
    without what had been delivered in between: the callback must know what it has, as
    `tiled_adapters.derived_writer` does. What is refused for good (an HTTP status of 4xx, or
    an error that is not one of a connection) is set aside as ``*.refused.jsonl``. Where the
    disk is nearly full, the rest of a run is skipped, and counted.

    When the interpreter exits, what is still queued has `EXIT_SECONDS` to be delivered.
    """

    def __init__(
        self, callback: Callback, *, name: str | None = None, spool: Path | str | None = None
    ) -> None:
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
        self._spool = None if spool is None else Spool(spool)
        self._guard = threading.RLock()  # of the spool, which the exit may write to as well
        self._heads: dict[str, list[tuple[str, Any]]] = {}  # run → what it begins with
        self._in_hand: tuple[str, Any] | None = None
        self._given_up = False
        self._attempt = 0
        self._due = 0.0
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
        """Block until every document handed in so far has had its turn, or is on disk.

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

        With a spool, what was not delivered in time is put on disk.

        Returns
        -------
        done
            False if `timeout` seconds passed before; the thread goes on meanwhile.
        """
        if self._end is None:
            self._end = threading.Event()
            self._mark(self._end)
        self._thread.join(timeout)
        self._save_rest()
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
            spooled=0 if self._spool is None else len(self._spool),
        )

    def _mark(self, event: threading.Event) -> None:
        """Have `event` set when all documents handed in so far have had their turn."""
        self._marks.add(event)
        self._queue.put(event)

    # ------------------------------------------------------------ the thread's own

    def _work(self) -> None:
        while self._end is None or not self._end.is_set():
            try:
                item = self._queue.get(timeout=self._pause())
            except queue.Empty:
                self._deliver_spooled()
                continue
            if isinstance(item, threading.Event):
                self._marks.discard(item)
                item.set()
            else:
                self._busy = 1
                self._in_hand = item
                self._deliver(*item)
                self._in_hand = None
                self._busy = 0
            del item  # a thread that waits must not hold the last document

    def _deliver(self, name: str, doc: Any) -> None:
        run: str | None = None
        try:
            run = self._find_run(name, doc)
            if self._spool is not None and run is not None and name in _HEAD:
                self._heads.setdefault(run, []).append((name, doc))
            if run in self._failed_runs:
                self._skipped += 1
            elif self._spool is not None and run is not None and self._must_wait():
                self._store(run, name, doc)
            else:
                self._callback(name, doc)
                if not self._given_up:
                    self._delivered += 1
        except BaseException as error:  # the thread must live on, whatever it was
            self._failed(run, name, doc, error)
        if name == "stop" and run is not None:
            self._forget(run)

    def _failed(self, run: str | None, name: str, doc: Any, error: BaseException) -> None:
        self._errors += 1
        self._last_error = f"{type(error).__name__}: {error}"
        if run is not None and self._spool is not None and _is_passing(error):
            logger.warning(
                "%s failed on a %s document: %s; run %s goes to %s until it can be delivered",
                *(self.name, name, self._last_error, run[:8], self._spool.folder),
            )
            self._store(run, name, doc)
            self._try_later()
            return
        rest = ""
        if run is not None:
            self._failed_runs.add(run)
            rest = f"; the rest of run {run[:8]} is not given to it"
        logger.error("%s failed on a %s document%s", self.name, name, rest, exc_info=error)

    def _forget(self, run: str) -> None:
        self._failed_runs.discard(run)
        self._heads.pop(run, None)
        self._run_of = {uid: of for uid, of in self._run_of.items() if of != run}

    # ---------------------------------------------------------------- the spool

    def _must_wait(self) -> bool:
        """Whether others wait on disk, or too many in memory."""
        assert self._spool is not None
        return bool(self._spool.runs()) or self._queue.qsize() > SLOW_DOCUMENTS

    def _store(self, run: str, name: str, doc: Any) -> None:
        """Put a document on disk, behind what its run begins with."""
        assert self._spool is not None
        with self._guard:
            if self._given_up:
                return
            documents = [(name, doc)]
            if run not in self._spool:  # what was delivered in between is not needed
                head = self._heads.get(run, [])
                documents = [d for d in head if d[1] is not doc] + documents
            try:
                self._spool.add(run, documents)
            except (OSError, TypeError, ValueError) as error:
                self._errors += 1
                self._skipped += 1
                self._last_error = f"{type(error).__name__}: {error}"
                self._failed_runs.add(run)
                logger.error(
                    "sink %s: the rest of run %s is lost: %s", self.name, run[:8], self._last_error
                )

    def _pause(self) -> float | None:
        """How long to wait for a document before the spool has its turn."""
        if self._spool is None or not self._spool.runs():
            return None
        return max(0.0, self._due - time.monotonic())

    def _try_later(self) -> None:
        delay = RETRY_SECONDS[min(self._attempt, len(RETRY_SECONDS) - 1)]
        self._attempt += 1
        self._due = time.monotonic() + delay

    def _deliver_spooled(self) -> None:
        """Deliver what waits on disk, the oldest first, until that fails."""
        assert self._spool is not None
        for run in self._spool.runs():
            count = 0
            try:
                for name, doc in self._spool.documents(run):
                    self._callback(name, doc)
                    count += 1
                    self._store_queued()
                    if self._given_up or (self._end is not None and self._end.is_set()):
                        return  # the rest is on disk
            except BaseException as error:
                self._errors += 1
                self._last_error = f"{type(error).__name__}: {error}"
                if _is_passing(error):
                    self._try_later()
                    return
                path = self._spool.set_aside(run)
                logger.exception("%s refused run %s, which is kept in %s", self.name, run[:8], path)
                continue
            with self._guard:
                if self._given_up:
                    return
                self._spool.remove(run)
            self._delivered += count
            self._attempt = 0
            logger.info("%s has taken run %s, %d documents late", self.name, run[:8], count)

    def _store_queued(self) -> None:
        """Make room in memory while the spool is delivered: later documents go behind it."""
        with suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, threading.Event):
                    self._marks.discard(item)
                    item.set()
                else:
                    self._deliver(*item)

    def _save_rest(self) -> None:
        """Put on disk what a callback that is stuck has not taken; any thread may call."""
        if self._spool is None:
            return
        with self._guard:
            if not self._given_up and self._thread.is_alive():
                items = [self._in_hand] if self._in_hand is not None else []
                marks: list[threading.Event] = []
                with suppress(queue.Empty):
                    while True:
                        item = self._queue.get_nowait()
                        (marks if isinstance(item, threading.Event) else items).append(item)
                for mark in marks:
                    self._queue.put(mark)
                for name, doc in items:
                    run = self._find_run(name, doc)
                    if run is not None and run not in self._failed_runs:
                        if name in _HEAD:
                            head = self._heads.setdefault(run, [])
                            head += [] if any(d is doc for _, d in head) else [(name, doc)]
                        self._store(run, name, doc)
                if items:
                    logger.warning(
                        "sink %s: %d documents wait in %s for the next process",
                        *(self.name, len(items), self._spool.folder),
                    )
            self._given_up = True
            self._spool.close()

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
    if sink is None or sink.wait(EXIT_SECONDS):
        return
    if sink._spool is not None:
        sink._save_rest()
    else:
        logger.warning(
            "sink %s: %d documents were not delivered before the interpreter's exit",
            sink.name,
            sink.health.pending,
        )


def _is_passing(error: BaseException) -> bool:
    """Whether the same document may be taken later: a server is down, slow or at fault."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # a key that has expired, a server that is busy
        return status >= 500 or status in (401, 403, 408, 425, 429)
    # httpx's errors of a connection are not Python's
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0].startswith(
        "httpx"
    )
