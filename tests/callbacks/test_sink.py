"""`BackgroundSink`: order, isolation, the failure policy, the spool, and the way out."""

import gc
import itertools
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import tiled.client.utils
from bluesky import RunEngine
from bluesky.plans import count
from event_model import compose_run
from ophyd.sim import det
from tiled.client import from_uri

from nanobeam_bluesky.callbacks import sink as module
from nanobeam_bluesky.callbacks import spool
from nanobeam_bluesky.callbacks.sink import BackgroundSink
from nanobeam_bluesky.tiled_adapters import derived_writer, serve, server
from nanobeam_bluesky.tiled_adapters.server import guarded


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


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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


def test_interpreter_exit_is_not_held_up_by_a_stuck_callback(tmp_path, open_sink):
    script = """
import sys, time
from nanobeam_bluesky.callbacks import sink
sink.EXIT_SECONDS = 0.2
stuck = sink.BackgroundSink(lambda name, doc: time.sleep(1000))
stuck("start", {"uid": "a"})
stuck("stop", {"uid": "b", "run_start": "a"})
saved = sink.BackgroundSink(lambda name, doc: time.sleep(1000), spool=sys.argv[1])
saved("start", {"uid": "a"})
saved("stop", {"uid": "b", "run_start": "a"})
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "2 documents were not delivered" in done.stderr
    assert "2 documents wait in" in done.stderr
    after = Recorder()
    open_sink(after, spool=tmp_path)
    until(lambda: [name for name, _ in after.documents] == ["start", "stop"])


# ------------------------------------------------------------------------- spool


@pytest.fixture
def quick(monkeypatch):
    """Retries at once."""
    monkeypatch.setattr(tiled.client.utils, "TILED_RETRY_ATTEMPTS", 1)
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.05,))


def check_run(client, documents):
    """Every event is there once, in order, and the run is complete."""
    run = client[documents[0][1]["uid"]]
    table = run["primary"].base["internal"].read()
    pages = [doc for name, doc in documents if name == "event_page"]
    assert table["seq_num"].tolist() == [n for page in pages for n in page["seq_num"]]
    strain = np.concatenate([page["data"]["strain"] for page in pages])
    np.testing.assert_array_equal(table["strain"].to_numpy(), strain)
    assert run.metadata["stop"]["exit_status"] == "success"


@pytest.fixture
def lies(monkeypatch):
    """Make servers answer 500 to so many requests of a method that they have in fact done."""
    left = {"PATCH": 0, "POST": 0}

    def at_fault(app):
        async def answer(scope, receive, send):
            async def lie(message):
                if message["type"] == "http.response.start" and message["status"] < 300:
                    method = scope["method"]
                    if scope["path"].startswith("/api/v1") and left.get(method, 0):
                        left[method] -= 1
                        message = message | {"status": 500}
                await send(message)

            await app(scope, receive, lie)

        return answer

    monkeypatch.setattr(server, "guarded", lambda app: guarded(at_fault(app)))
    return left


@pytest.mark.usefixtures("quick")
def test_rows_are_written_once_whatever_the_server_does_also_by_the_next_process(
    tmp_path, derived_documents, open_sink, lies
):
    runs = [derived_documents((4, 5), page=4), derived_documents((2, 3), page=2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve(tmp_path / "runs", port=port) as url:
        client = from_uri(url)["derived"]
        before = open_sink(derived_writer(client), spool=tmp_path / "spool")
        lies.update(POST=1, PATCH=2)
        for name, doc in runs[0][:4]:
            before(name, doc)
        until(lambda: before.wait(10) and not before.health.spooled)
    assert lies == {"POST": 0, "PATCH": 0}
    for name, doc in runs[0][4:] + runs[1]:  # the server is down
        before(name, doc)
    assert before.wait(10)
    assert before.health.spooled >= len(runs[0][4:] + runs[1])
    assert before.close(10)
    client.context.close()
    lies.update(POST=1, PATCH=2)
    with serve(tmp_path / "runs", port=port) as url:
        client = from_uri(url)["derived"]
        after = open_sink(derived_writer(client), spool=tmp_path / "spool")
        until(lambda: not after.health.spooled)
        assert lies == {"POST": 0, "PATCH": 0}
        for documents in runs:
            check_run(client, documents)
        assert not list((tmp_path / "spool").glob("*.jsonl"))
        client.context.close()


def test_a_slow_callback_fills_the_disk_and_not_the_memory(tmp_path, monkeypatch, open_sink):
    monkeypatch.setattr(module, "SLOW_DOCUMENTS", 5)
    recorder = Recorder()
    recorder.gate.clear()
    slow = open_sink(recorder, spool=tmp_path)
    runs = [run_documents(4) for _ in range(5)]
    for name, doc in itertools.chain(*runs):
        slow(name, doc)
    recorder.gate.set()
    until(lambda: slow.wait(10) and not slow.health.spooled)
    order = [doc["uid"] for name, doc in recorder.documents if name == "stop"]
    assert order == [documents[-1][1]["uid"] for documents in runs]
    events = [doc["uid"] for name, doc in recorder.documents if name == "event"]
    assert events == [doc["uid"] for run in runs for name, doc in run if name == "event"]


@pytest.mark.usefixtures("quick")
def test_what_is_refused_for_good_is_set_aside_and_the_next_run_goes_on(tmp_path, open_sink):
    down = [True]
    bad, good = run_documents(), run_documents()

    def take(name, doc):
        if down[0]:
            raise ConnectionRefusedError("down")
        if doc is not None and doc["uid"] == bad[2][1]["uid"]:
            raise ValueError("no such column")
        taken.append(name)

    taken = []
    target = open_sink(take, spool=tmp_path)
    for name, doc in bad + good:
        target(name, doc)
    assert target.wait(10)
    down[0] = False
    until(lambda: not target.health.spooled)
    assert taken == ["start", "descriptor"] + [name for name, _ in good]
    (kept,) = tmp_path.glob("*.refused.jsonl")
    assert [json.loads(line)[0] for line in kept.read_text().splitlines()] == [n for n, _ in bad]
    assert "no such column" in target.health.last_error


def test_a_full_disk_ends_the_spool_and_says_so(tmp_path, monkeypatch, open_sink, caplog):
    def take(name, doc):
        raise ConnectionRefusedError("down")

    monkeypatch.setattr(spool, "FREE_BYTES", 2 * shutil.disk_usage(tmp_path).free)
    target = open_sink(take, spool=tmp_path)
    for name, doc in run_documents():
        target(name, doc)
    assert target.wait(10)
    assert target.health.skipped == 6
    assert "GB are free" in target.health.last_error
    assert "is lost" in caplog.text


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    first = spool.Spool(tmp_path)
    first.add("../a/b", [("start", {"uid": "../a/b"}), ("stop", {"x": float("nan")})])
    first.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text()[:-3])
    second = spool.Spool(tmp_path)
    (run,) = second.runs()
    assert list(second.documents(run)) == [("start", {"uid": "../a/b"})]
    with pytest.raises(BlockingIOError, match="in use by another process"):
        spool.Spool(tmp_path)
    second.close()


def test_close_puts_on_disk_what_a_stuck_callback_has_not_taken(tmp_path, open_sink):
    recorder = Recorder()
    recorder.gate.clear()
    stuck = open_sink(recorder, spool=tmp_path)
    documents = run_documents()
    for name, doc in documents:
        stuck(name, doc)
    assert not stuck.close(0.05)
    recorder.gate.set()
    assert stuck.close(10)
    after = Recorder()
    open_sink(after, spool=tmp_path)
    until(lambda: [name for name, _ in after.documents] == [name for name, _ in documents])
