"""ZMQ by the real proxy, NATS by a real server, Kafka by its client's mock cluster."""

import json
import shutil
import socket
import subprocess
import time

import pytest
from bluesky.plans import count
from ophyd.sim import det

from nanobeam_bluesky.transports import to_json, to_msgpack


def plain(documents):
    """Compare documents by what JSON makes of them: there are no tuples on a wire."""
    return [(name, json.loads(to_json(doc))) for name, doc in documents]


@pytest.fixture
def flown(RE):
    """Documents of a run, as the RunEngine emits them to this publisher as well."""

    def fly(publisher):
        documents = []
        token = RE.subscribe(publisher)
        RE(count([det], 2), lambda name, doc: documents.append((name, doc)))
        RE.unsubscribe(token)
        return plain(documents)

    return fly


def test_zmq_carries_json_msgpack_and_bluesky_s_own_pickles(zmq_proxy, listen, until, flown):
    from bluesky.callbacks.zmq import Publisher

    from nanobeam_bluesky.transports import ZMQPublisher, ZMQSource

    found = listen(ZMQSource(zmq_proxy[1]))
    publishers = [
        ZMQPublisher(zmq_proxy[0]),
        Publisher(zmq_proxy[0], serializer=to_msgpack),
        Publisher(zmq_proxy[0]),
    ]
    time.sleep(0.3)  # they join slowly, too
    runs = [flown(publisher) for publisher in publishers]
    until(lambda: len(found) == 15)
    assert plain(found) == [pair for run in runs for pair in run]
    publishers[0]("weather", {})  # a name that is none ends bluesky's dispatcher
    until(lambda: flown(publishers[0]) and len(found) > 15)
    for publisher in publishers:
        publisher.close()


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory):
    """A server with JetStream, as bluesky-nats needs it."""
    pytest.importorskip("nats")
    program = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin")
    if program is None:
        pytest.skip("no nats-server; on Debian: apt-get install nats-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("nats")

    def start():
        process = subprocess.Popen(
            [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder)],
            stderr=subprocess.DEVNULL,
        )
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        return process

    processes = [start()]

    def restart():
        processes[-1].terminate()
        processes[-1].wait(10)
        processes.append(start())

    yield f"nats://127.0.0.1:{port}", restart
    processes[-1].terminate()
    processes[-1].wait(10)


def test_nats_carries_documents_and_comes_back_with_its_server(nats_server, listen, until, flown):
    from nanobeam_bluesky.transports import NATSPublisher, NATSSource

    url, restart = nats_server
    came = listen(NATSSource(url))
    publisher = NATSPublisher(url, "events.volatile")  # as bluesky-nats does
    run = flown(publisher)
    until(lambda: len(came) == 5)
    assert came == run
    restart()
    # both sides find the server by themselves, in seconds, the publisher perhaps first
    until(lambda: [publisher("start", {"uid": "a"}), time.sleep(0.2), len(came) > 5][-1])
    assert came[5] == ("start", {"uid": "a"})
    publisher.close()


def test_nats_says_that_there_is_no_server(monkeypatch):
    nats = pytest.importorskip("nanobeam_bluesky.transports.nats")
    monkeypatch.setattr(nats, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ConnectionError, match="no NATS server at nats://127"):
        nats.NATSPublisher("nats://127.0.0.1:9")


def test_kafka_carries_documents_by_its_clients_mock_cluster(listen, until, flown):
    """Not a real broker: librdkafka's own, in the client's process."""
    pytest.importorskip("confluent_kafka")
    from confluent_kafka import Producer

    from nanobeam_bluesky.transports import KafkaPublisher, KafkaSource

    cluster = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused"})
    servers = ",".join(
        f"{broker.host}:{broker.port}" for broker in cluster.list_topics().brokers.values()
    )
    publisher = KafkaPublisher(servers, "documents")
    publisher("start", {"uid": "earlier"})
    publisher.close()
    came = listen(KafkaSource(servers, "documents"))
    cluster.produce("documents", b"no document", key=b"nanobeam")
    cluster.flush()
    run = flown(publisher)
    publisher.close()
    until(lambda: len(came) >= 6)
    assert came[0][0] == "message"
    assert "expected JSON" in came[0][1]
    assert came[1:] == run
