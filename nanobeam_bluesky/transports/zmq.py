"""ZMQ, by Bluesky's own `bluesky.callbacks.zmq`: Publisher → Proxy → RemoteDispatcher.

A dispatcher joins a proxy some tenths of a second after it has connected, and what was
published before is lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from bluesky.callbacks.zmq import Publisher, RemoteDispatcher

from nanobeam_bluesky.transports.receiver import Take
from nanobeam_bluesky.transports.wire import decode, to_json

__all__ = ["ZMQPublisher", "ZMQSource"]

logger = logging.getLogger("nanobeam_bluesky")

SETTLE_SECONDS = 0.5
"""What a subscriber takes to join, with some to spare; ZMQ does not tell."""
_STOP_SECONDS = 0.1


class ZMQSource:
    """Documents from the outgoing address of a ``bluesky-0MQ-proxy``.

    Parameters
    ----------
    address
        Such as "127.0.0.1:5568", or its port alone.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked(address)

    def run(self, take: Take, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Hand documents to `take` until `stop` is set."""
        while not stop.is_set():
            loop = asyncio.new_event_loop()
            dispatcher = RemoteDispatcher(self.address, loop=loop, deserializer=_read)
            dispatcher.subscribe(lambda name, doc: take(name, doc))
            loop.call_later(SETTLE_SECONDS, ready)
            _watch(loop, stop)
            try:
                dispatcher.start()
            except asyncio.CancelledError:
                return
            except Exception as error:  # a message with a name that is none ends a dispatcher
                logger.warning("the subscription to %s begins again: %r", self.address, error)


def _read(data: bytes) -> Any:
    try:
        return decode(data)
    except Exception as error:  # of whatever stands in the message
        return f"{error}"


def _watch(loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
    """End a dispatcher, which has no method for it, when `stop` is set."""
    if stop.is_set():
        for task in asyncio.all_tasks(loop):
            task.cancel()
    else:
        loop.call_later(_STOP_SECONDS, _watch, loop, stop)


class ZMQPublisher(Publisher):
    """Bluesky's Publisher to the incoming address of a proxy, of JSON, which is safe to read.

    Parameters
    ----------
    address
        Such as "127.0.0.1:5567", or its port alone.
    """

    def __init__(self, address: str) -> None:
        super().__init__(_checked(address), serializer=to_json)


def _checked(address: str) -> str:
    host, _, port = address.rpartition(":")
    if "://" in address:  # such as ipc:///run/bluesky
        return address
    if not port.isdecimal():
        raise ValueError(f"ZMQ address {address!r}: expected HOST:PORT, e.g. 127.0.0.1:5568")
    return f"{host or '127.0.0.1'}:{port}"
