"""Documents from, and to, other processes: ZMQ, NATS, Kafka, Tiled, and plain files.

A source is run by ``source.run(take, stop, ready)``: it calls ``take(name, doc)`` for every
document until the event `stop` is set, and ``ready()`` once it listens. A publisher is a
document callback with ``close()``.
"""

from typing import TYPE_CHECKING

from nanobeam_bluesky._lazy import lazy

if TYPE_CHECKING:
    from nanobeam_bluesky.transports.files import FileWatch
    from nanobeam_bluesky.transports.kafka import KafkaPublisher, KafkaSource
    from nanobeam_bluesky.transports.nats import NATSPublisher, NATSSource
    from nanobeam_bluesky.transports.receiver import Receiver, Source
    from nanobeam_bluesky.transports.tiled import TiledSource
    from nanobeam_bluesky.transports.wire import decode, to_json, to_msgpack
    from nanobeam_bluesky.transports.zmq import ZMQPublisher, ZMQSource

__all__ = [
    "FileWatch",
    "KafkaPublisher",
    "KafkaSource",
    "NATSPublisher",
    "NATSSource",
    "Receiver",
    "Source",
    "TiledSource",
    "ZMQPublisher",
    "ZMQSource",
    "decode",
    "to_json",
    "to_msgpack",
]

__getattr__ = lazy(
    __name__,
    {
        "FileWatch": "files",
        "KafkaPublisher": "kafka",
        "KafkaSource": "kafka",
        "NATSPublisher": "nats",
        "NATSSource": "nats",
        "Receiver": "receiver",
        "Source": "receiver",
        "TiledSource": "tiled",
        "ZMQPublisher": "zmq",
        "ZMQSource": "zmq",
        "decode": "wire",
        "to_json": "wire",
        "to_msgpack": "wire",
    },
)
