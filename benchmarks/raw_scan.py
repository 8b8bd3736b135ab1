"""What the callback costs a scan: interleaved pairs of detector-paced scans, without and with.

For the callback in good health, and with its model missing, its worker raising on every
frame, its worker killed again and again, and the disk of its derived data full. Prints
the median of (time with) / (time without), and whether the raw documents are the same.

    python -m benchmarks.raw_scan [--pairs 5] [--seconds 20] [--conditions healthy,killed]
"""

import argparse
import contextlib
import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlparse

from bluesky import RunEngine

from nanobeam_bluesky.callbacks import NanobeamCallback
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly

ROWS = 10
RAISING = """
import logging
logging.disable()
from nanobeam_bluesky.models import Analyzer
def process(self, patterns):
    raise RuntimeError("as the benchmark wants it")
Analyzer.process = process
"""


class Timed:
    """Takes the processor time that a callback needs in the RunEngine's thread."""

    def __init__(self, callback):
        self.callback = callback
        self.microseconds = []

    def __call__(self, name, doc):
        before = time.thread_time_ns()
        self.callback(name, doc)
        self.microseconds.append(1e-3 * (time.thread_time_ns() - before))


@contextlib.contextmanager
def healthy(folder, analyzer="auto"):
    callback = NanobeamCallback(analyzer)
    callback.subscribe(lambda name, doc: None)
    yield callback
    callback.close()


@contextlib.contextmanager
def raising(folder, analyzer="auto"):
    (Path(folder) / "sitecustomize.py").write_text(RAISING)
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), old]))
    try:
        with healthy(folder, analyzer) as callback:
            yield callback
    finally:
        os.environ.pop("PYTHONPATH")
        if old is not None:
            os.environ["PYTHONPATH"] = old


@contextlib.contextmanager
def killed(folder, analyzer="auto"):
    with healthy(folder, analyzer) as callback:
        done = threading.Event()

        def kill():
            while not done.wait(4):
                if not callback.health.worker_ready:
                    continue  # else it might never come to work at all
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(callback.health.worker_pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        yield callback
        done.set()
        thread.join()


@contextlib.contextmanager
def disk_full(folder, analyzer="auto"):
    with healthy(folder, analyzer) as callback, open("/dev/full", "w") as file:

        def write(name, doc):
            file.write(f"{name}\n")
            file.flush()

        callback.subscribe(write)
        yield callback
        with contextlib.suppress(OSError):
            file.close()


CONDITIONS = {
    "healthy": healthy,
    "no model": healthy,  # its geometry has none
    "raising": raising,
    "killed": killed,
    "disk full": disk_full,
}


def outline(documents):
    """What a raw run consists of, whatever the chunks and the clock."""
    points = {}
    resources = {}
    for name, doc in documents:
        if name == "stream_resource":
            resources[doc["uid"]] = doc["data_key"]
        elif name == "stream_datum":
            numbers = range(doc["seq_nums"]["start"], doc["seq_nums"]["stop"])
            points.setdefault(resources[doc["stream_resource"]], []).extend(numbers)
    stop = documents[-1][1]
    start = {k: v for k, v in documents[0][1].items() if k not in ("uid", "time", "scan_id")}
    return start, points, stop["exit_status"], stop["num_events"]


def fly(engine, sxdm, dwell, callback=None):
    """Fly once; return seconds from start to stop, and the outline."""
    documents, times = [], []

    def record(name, doc):
        documents.append((name, doc))
        if name in ("start", "stop"):
            times.append(time.perf_counter())

    tokens = [engine.subscribe(record)]
    if callback is not None:
        tokens.append(engine.subscribe(callback))
    engine(sxdm_fly(sxdm, dwell_s=dwell))
    for token in tokens:
        engine.unsubscribe(token)
    if callback is not None:
        callback.callback.wait(300)
    for name, doc in documents:
        if name == "stream_resource":
            Path(unquote(urlparse(doc["uri"]).path)).unlink(missing_ok=True)
    return times[1] - times[0], outline(documents)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--hz", type=float, default=200)
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    options = parser.parse_args(arguments)
    columns = int(options.seconds * options.hz / ROWS)
    engine = RunEngine()
    print(
        f"{ROWS} × {columns} points at {options.hz:g} Hz, 512 × 512 uint16; {options.pairs} pairs\n"
        f"{'callback':12} {'time with / without':>20} {'range':>17} "
        f"{'µs/document':>12} {'99.9 %':>7}  raw documents"
    )
    for name in options.conditions.split(","):
        geometry = Geometry.published()
        if name == "no model":
            geometry = geometry.model_copy(update={"thickness_nm": 13.0})
        ratios, microseconds, same = [], [], True
        with tempfile.TemporaryDirectory() as folder, CONDITIONS[name](folder) as callback:
            sxdm = SimulatedSXDM(phantom("figure3", (ROWS, columns)), geometry, folder)
            fly(engine, sxdm, 0.0)  # renders, and warms up
            for _ in range(options.pairs):
                without, plain = fly(engine, sxdm, 1 / options.hz)
                timed = Timed(callback)
                with_, outlined = fly(engine, sxdm, 1 / options.hz, timed)
                ratios.append(with_ / without)
                microseconds += timed.microseconds
                same &= plain == outlined
        microseconds.sort()
        print(
            f"{name:12} {statistics.median(ratios):20.4f} "
            f"{min(ratios):8.4f}–{max(ratios):.4f} {statistics.median(microseconds):12.1f} "
            f"{microseconds[int(0.999 * len(microseconds))]:7.0f}  {'same' if same else 'DIFFER'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
