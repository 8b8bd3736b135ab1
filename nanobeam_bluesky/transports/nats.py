"""NATS. Documents come as bluesky-nats publishes them: msgpack on ``<subject>.<name>``.

Core NATS, not JetStream: what a stream stores is delivered to plain subscribers as well,
and nothing here waits for acknowledgements.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from nanobeam_bluesky.transports.receiver import Take, without_secrets
from nanobeam_bluesky.transports.wire import decode, to_msgpack

__all__ = ["NATSPublisher", "NATSSource"]

logger = logging.getLogger("nanobeam_bluesky")

SUBJECT = "events.>"
"""Everything that bluesky-nats publishes by default."""
DERIVED_SUBJECT = "nanobeam.derived"
CONNECT_SECONDS = 10.0
PUBLISH_SECONDS = 30.0
_STOP_SECONDS = 0.1


class NATSSource:
    """Documents from a NATS server.

    Parameters
    ----------
    url
        Such as "nats://127.0.0.1:4222".
    subject
        What to listen to; the last part of a message's subject is the document's name.
    """

    def __init__(self, url: str, subject: str = SUBJECT) -> None:
        self.url = url
        self.subject = subject

    def run(self, take: Take, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Hand documents to `take` until `stop` is set."""
        asyncio.run(self._run(take, stop, ready))

    async def _run(self, take: Take, stop: threading.Event, ready: Callable[[], None]) -> None:
        async def receive(message: Msg) -> None:
            name = message.subject.rpartition(".")[2]
            try:
                doc = decode(message.data)
            except Exception as error:  # of whatever stands in the message
                doc = f"{error}"
            take(name, doc)

        client = await _connect(self.url)
        try:
            await client.subscribe(self.subject, cb=receive)
            await client.flush()
            ready()
            while not stop.is_set():
                await asyncio.sleep(_STOP_SECONDS)
        finally:
            await client.close()


class NATSPublisher:
    """Publishes documents to ``<subject>.<name>``; while the server is away they wait in memory.

    Parameters
    ----------
    url
        Such as "nats://127.0.0.1:4222".
    subject
        First part of the subject.

    Raises
    ------
    ConnectionError
        If there is no server.
    """

    def __init__(self, url: str, subject: str = DERIVED_SUBJECT) -> None:
        self.subject = subject
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="nats publisher", daemon=True
        )
        self._thread.start()
        try:
            self._client = self._do(_connect(url))
        except BaseException:
            self._end()
            raise

    def __call__(self, name: str, doc: Any) -> None:
        """Publish a document: hand it to the client, which sends it when it can."""
        self._do(self._client.publish(f"{self.subject}.{name}", to_msgpack(doc)))

    def close(self) -> None:
        """Send what waits, and leave."""
        if self._thread.is_alive():
            try:
                self._do(self._client.drain())
            finally:
                self._end()

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PUBLISH_SECONDS)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _connect(url: str) -> Client:
    """Connect once; from then on the client finds the server again by itself."""
    where = without_secrets(url)

    async def lost() -> None:
        logger.warning("the connection to %s is lost; documents may be missed", where)

    async def back() -> None:
        logger.warning("%s is connected again", where)

    async def failed(error: Exception) -> None:
        logger.debug("%s: %s", where, error)

    client = Client()
    try:
        await asyncio.wait_for(
            client.connect(
                url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=1,
                disconnected_cb=lost,
                reconnected_cb=back,
                error_cb=failed,
            ),
            CONNECT_SECONDS,
        )
    except (OSError, TimeoutError, nats.errors.Error) as error:
        raise ConnectionError(
            f"no NATS server at {where}: {error or type(error).__name__}"
        ) from error
    return client
