"""`BackgroundSink`: order, isolation, the failure policy, and the way out."""

import gc
import logging
import subprocess
import sys
import threading
import weakref

import pytest
from bluesky import RunEngine
from bluesky.plans import count
from event_model import compose_run
from ophyd.sim import det

from nanobeam_bluesky.callbacks.sink import BackgroundSink


class Recorder:
    """Keeps what it is given; waits for `gate`; raises where told."""

    def __init__(self, fail_on=lambda name, doc: False):
        self.documents = []
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()
        self.fail_on = fail_on

    def __call__(self, name, doc):
        self.gate.wait()
        self.threads.add(threading.current_thread())
        if self.fail_on(name, doc):
            raise OSError("disk full")
        self.documents.append((name, doc))


def run_documents(num_events=3):
    run = compose_run()
    key = {"dtype": "number", "shape": [], "source": "test"}
    stream = run.compose_descriptor(name="primary", data_keys={"x": key})
    events = [
        ("event", stream.compose_event(data={"x": i}, timestamps={"x": 0.0}))
        for i in range(num_events)
    ]
    return [
        ("start", run.start_doc),
        ("descriptor", stream.descriptor_doc),
        *events,
        ("stop", run.compose_stop()),
    ]


@pytest.fixture
def open_sink():
    sinks = []

    def make(callback, **options):
        sinks.append(BackgroundSink(callback, **options))
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.close(10)


def test_documents_arrive_once_in_order_in_another_thread(open_sink):
    recorder = Recorder()
    sink = open_sink(recorder)
    documents = [pair for _ in range(20) for pair in run_documents()]
    for name, doc in documents:
        sink(name, doc)
    assert sink.wait(10)
    assert recorder.documents == documents
    assert threading.current_thread() not in recorder.threads
    assert (sink.health.delivered, sink.health.pending, sink.health.errors) == (
        len(documents),
        0,
        0,
    )


def test_handing_in_does_not_wait_for_the_callback(open_sink):
    recorder = Recorder()
    recorder.gate.clear()
    sink = open_sink(recorder)
    for _ in range(1000):
        sink("event", {"descriptor": "unknown"})
    assert sink.health.pending == 1000
    assert not sink.wait(0.05)
    recorder.gate.set()
    assert sink.wait(10)
    assert sink.health.pending == 0


def test_failed_run_is_skipped_to_its_end_and_the_next_one_is_tried(open_sink, caplog):
    first, second = run_documents(), run_documents()
    recorder = Recorder(lambda name, doc: doc is first[2][1])
    sink = open_sink(recorder)
    with caplog.at_level(logging.ERROR, "nanobeam_bluesky"):
        for name, doc in first + second:
            sink(name, doc)
        assert sink.wait(10)
    assert recorder.documents == first[:2] + second
    health = sink.health
    assert (health.errors, health.skipped) == (1, 3)
    assert health.last_error == "OSError: disk full"
    (record,) = caplog.records
    assert "disk full" in str(record.exc_info[1])
    assert "Recorder failed on a event document" in record.getMessage()
    assert first[0][1]["uid"][:8] in record.getMessage()


def test_failed_run_does_not_stop_an_interleaved_one(open_sink):
    bad, good = run_documents(), run_documents()
    recorder = Recorder(lambda name, doc: doc is bad[1][1])
    sink = open_sink(recorder)
    for pair in zip(bad, good, strict=True):
        for name, doc in pair:
            sink(name, doc)
    assert sink.wait(10)
    assert recorder.documents == [bad[0], *good]


def test_close_delivers_what_is_queued_and_counts_what_comes_later(open_sink, caplog):
    recorder = Recorder()
    recorder.gate.clear()
    sink = open_sink(recorder)
    documents = run_documents()
    for name, doc in documents:
        sink(name, doc)
    assert not sink.close(0.05)
    recorder.gate.set()
    assert sink.close(10)
    sink("start", {"uid": "late"})
    sink("start", {"uid": "later"})
    assert recorder.documents == documents
    assert sink.health.skipped == 2
    assert caplog.text.count("takes no more documents") == 1
    assert sink.wait(1)


def test_wait_returns_when_another_thread_closes_the_sink():
    recorder = Recorder()
    sink = BackgroundSink(recorder)
    recorder.gate.clear()
    sink("start", {"uid": "a"})
    closing = threading.Timer(0.1, lambda: (recorder.gate.set(), sink.close()))
    closing.start()
    assert sink.wait(10)
    closing.join()


def test_closed_sink_frees_its_callback():
    recorder = Recorder()
    sink = BackgroundSink(recorder)
    sink.close()
    reference = weakref.ref(recorder)
    del recorder, sink
    gc.collect()
    assert reference() is None


def test_run_engine_never_sees_the_callback_fail(open_sink):
    sink = open_sink(Recorder(lambda name, doc: True), name="broken")
    seen = []
    engine = RunEngine()
    engine.subscribe(sink)
    engine.subscribe(lambda name, doc: seen.append(name))
    engine(count([det], 3))
    assert seen == ["start", "descriptor", "event", "event", "event", "stop"]
    assert sink.wait(10)
    assert sink.health.errors == 1
    assert sink.health.skipped == 5


def test_interpreter_exit_delivers_what_is_queued():
    script = """
import time
from nanobeam_bluesky.callbacks.sink import BackgroundSink

def slow(name, doc):
    time.sleep(0.05)
    print(doc["uid"], flush=True)

sink = BackgroundSink(slow)
for i in range(10):
    sink("start", {"uid": str(i)})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(i) for i in range(10)]
    assert done.returncode == 0


def test_interpreter_exit_is_not_held_up_by_a_stuck_callback():
    script = """
import time
from nanobeam_bluesky.callbacks import sink
sink.EXIT_SECONDS = 0.2
stuck = sink.BackgroundSink(lambda name, doc: time.sleep(1000))
stuck("start", {"uid": "a"})
stuck("stop", {"uid": "b", "run_start": "a"})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "2 documents were not delivered" in done.stderr
