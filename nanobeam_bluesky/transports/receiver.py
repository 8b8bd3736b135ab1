"""`Receiver`: between a transport, which may lose documents, and a callback."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from event_model import DocumentNames

__all__ = ["Receiver", "Source", "Take", "without_secrets"]

logger = logging.getLogger("nanobeam_bluesky")

Take = Callable[[str, Any], Any]
_NAMES = frozenset(DocumentNames.__members__)
_OF_RUN = frozenset({"descriptor", "resource", "stream_resource", "stop"})


class Source(Protocol):
    """Where documents come from."""

    def run(self, take: Take, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Hand documents to `take` until `stop` is set; call `ready` when listening.

        Raises
        ------
        OSError, ValueError
            If it cannot listen: says where, and what to do.
        """


class Receiver:
    """Passes documents on, and tells of runs that were met in their middle.

    A callback ignores documents of a run whose start it has not seen, so there is no map
    of half a run; here that is logged.

    Parameters
    ----------
    callback
        Takes the documents.
    """

    def __init__(self, callback: Take) -> None:
        self._callback = callback
        self._runs: set[str] = set()
        self._missed: set[str] = set()
        self.runs_missed = 0
        """Runs met in their middle."""
        self.unreadable = 0
        """Messages that were no documents."""

    def __call__(self, name: str, doc: Any) -> None:
        """Take what a transport has received; never raises."""
        # bluesky's dispatchers name documents by the members of an enumeration
        name = name.name if isinstance(name, DocumentNames) else name
        if name not in _NAMES or not isinstance(doc, Mapping):
            self._refuse(f"{name!r}: {doc!r}")
            return
        try:
            self._watch(name, doc)
            self._callback(name, doc)
        except Exception as error:
            self._refuse(f"{name!r}: {type(error).__name__}: {error}")

    def _refuse(self, what: str) -> None:
        self.unreadable += 1
        if self.unreadable == 1:
            logger.warning("a message is no document, and there may be more: %s", what[:500])

    def _watch(self, name: str, doc: Mapping[str, Any]) -> None:
        if name == "start":
            self._runs.add(str(doc["uid"]))
        if name not in _OF_RUN or "run_start" not in doc:
            return
        run = str(doc["run_start"])
        if run not in self._runs and run not in self._missed:
            self._missed.add(run)
            self.runs_missed += 1
            logger.warning(
                "run %s was met in its middle: its start document did not come, so it is not "
                "mapped; map it from where it is recorded",
                run[:8],
            )
        if name == "stop":
            self._runs.discard(run)
            self._missed.discard(run)


def without_secrets(address: str) -> str:
    """Return an address without key, user and password, for people and logs."""
    scheme, separator, rest = address.partition("?")[0].rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else rest
