"""Kafka. Messages are as bluesky-kafka writes them: msgpack of ``[name, document]``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from nanobeam_bluesky.transports.receiver import Take
from nanobeam_bluesky.transports.wire import decode, to_msgpack

__all__ = ["KafkaPublisher", "KafkaSource"]

logger = logging.getLogger("nanobeam_bluesky")

DERIVED_TOPIC = "nanobeam.derived"
POLL_SECONDS = 0.1
CLOSE_SECONDS = 10.0
CONNECT_SECONDS = 10.0
TOPIC_SECONDS = 5.0
_KEY = b"nanobeam"
"""One key, so that all goes to one partition, which alone keeps the order."""


class KafkaSource:
    """Documents from a Kafka topic, from now on.

    Parameters
    ----------
    servers
        Such as "127.0.0.1:9092", or several with commas.
    topic
        Where the beamline publishes, e.g. "hxn.bluesky.runengine.documents".
    settings
        Further settings of `confluent_kafka.Consumer`, such as those of a login.
    """

    def __init__(self, servers: str, topic: str, settings: dict[str, Any] | None = None) -> None:
        self.servers = servers
        self.topic = topic
        self._settings = {
            "bootstrap.servers": servers,
            "group.id": "nanobeam-live",  # which the client wants, though it joins none
            "enable.auto.commit": False,
            **(settings or {}),
        }

    def run(self, take: Take, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Hand documents to `take` until `stop` is set."""
        consumer = Consumer(self._settings)
        last = ""
        try:
            consumer.assign(self._partitions(consumer, stop))
            ready()
            while not stop.is_set():
                message = consumer.poll(POLL_SECONDS)
                if message is None:
                    continue
                if message.error():
                    text = message.error().str()
                    if text != last and message.error().code() != KafkaError._PARTITION_EOF:
                        logger.warning("Kafka topic %s: %s", self.topic, text)
                    last = text
                    continue
                try:
                    name, doc = decode(message.value())
                except Exception as error:  # of whatever stands in the message
                    name, doc = "message", f"{error}"
                take(name, doc)
        finally:
            consumer.close()

    def _partitions(self, consumer: Consumer, stop: threading.Event) -> list[TopicPartition]:
        """Return the topic's partitions with where they end now; waits until there is one.

        Not by a group's subscription, which takes seconds to begin, and loses what is
        published until it has made out what "latest" is.
        """
        try:
            while not stop.is_set():
                found = consumer.list_topics(self.topic, timeout=CONNECT_SECONDS).topics[self.topic]
                parts = [TopicPartition(self.topic, number) for number in found.partitions]
                for part in parts:
                    part.offset = consumer.get_watermark_offsets(part, timeout=CONNECT_SECONDS)[1]
                if parts:
                    return parts
                logger.warning("Kafka topic %s is not there yet", self.topic)
                stop.wait(TOPIC_SECONDS)
        except KafkaException as error:
            raise ConnectionError(f"no Kafka at {self.servers}: {error}") from error
        return []


class KafkaPublisher:
    """Publishes documents to a topic; the client sends them, and tries again, by itself.

    Parameters
    ----------
    servers, topic, settings
        As for `KafkaSource`.
    """

    def __init__(
        self, servers: str, topic: str = DERIVED_TOPIC, settings: dict[str, Any] | None = None
    ) -> None:
        self.topic = topic
        self._producer = Producer({"bootstrap.servers": servers, **(settings or {})})
        self._failures: list[str] = []

    def __call__(self, name: str, doc: Any) -> None:
        """Queue a document.

        Raises
        ------
        ConnectionError
            If an earlier one could not be delivered.
        """
        self._producer.produce(
            self.topic, key=_KEY, value=to_msgpack([name, doc]), on_delivery=self._delivered
        )
        self._producer.poll(0)
        if self._failures:
            raise ConnectionError(f"Kafka topic {self.topic}: {self._failures.pop()}")

    def close(self) -> None:
        """Wait until what is queued has been delivered, no longer than `CLOSE_SECONDS`."""
        if left := self._producer.flush(CLOSE_SECONDS):
            logger.warning("Kafka topic %s: %d documents were not delivered", self.topic, left)

    def _delivered(self, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self._failures.append(error.str())
