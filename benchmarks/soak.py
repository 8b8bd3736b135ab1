"""What must hold for long: many runs, large scans, a fast detector, every document and fault.

    python -m benchmarks.soak [runs] [references] [latency] [thread]

``runs``: 10 000 runs through one callback; memory, threads and open files of both processes.
``references``: a scan of 1000 × 1000 points by reference; peak memory of the callback's process.
``latency``: frame on disk → value in the derived stream, at 1 kHz for a minute.
``thread``: processor time of the RunEngine's thread for a document, by dialect and by fault.
"""

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import re
import resource
import runpy
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from bluesky import RunEngine
from event_model import DocumentNames

from benchmarks.pipeline import Documents, frames_of, record
from benchmarks.raw_scan import CONDITIONS, Timed, healthy
from nanobeam_bluesky.callbacks import NanobeamCallback
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Flag
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly

MEGABYTE = 1e6
HEADS = ("start", "descriptor", "resource", "stream_resource")
DIALECTS = Path(__file__).parents[1] / "tests" / "documents" / "test_dialects.py"


def small(pixels: int) -> Geometry:
    """Return the published condition on a detector of so many pixels across."""
    center = (pixels / 2, pixels / 2)
    update = {"detector_shape": (pixels, pixels), "bragg_center_px": center}
    return Geometry.published().model_copy(update=update)


def usage(pid: int) -> tuple[float, int, int]:
    """Return resident memory (MB), threads and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    folder = Path(f"/proc/{pid}")
    counts = (len(list((folder / part).iterdir())) for part in ("task", "fd"))
    threads, files = counts
    return pages * resource.getpagesize() / MEGABYTE, threads, files


def ready(callback: NanobeamCallback) -> None:
    """Wait until the worker has imported and compiled what it needs."""
    while not callback.health.worker_ready:
        time.sleep(0.1)


class Renewed:
    """Gives the documents of a recorded run again and again, each time as another run."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        uids = {
            doc["uid"][:8]
            for name, doc in documents
            if name in HEADS and isinstance(doc["uid"], str)
        }
        self._uids = re.compile("|".join(map(re.escape, uids)))
        self._count = itertools.count(1)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        mark = f"{next(self._count):08x}"

        def renewed(value: Any) -> Any:
            if isinstance(value, str):
                return self._uids.sub(lambda found: f"{mark}-{found[0]}", value)
            if isinstance(value, dict):
                return {renewed(k): renewed(v) for k, v in value.items()}
            if isinstance(value, list) and value and isinstance(value[0], str | dict):
                return [renewed(v) for v in value]
            return value

        for name, doc in self.documents:
            yield name, {k: v if k == "uri" else renewed(v) for k, v in doc.items()}


# --------------------------------------------------------------------------- runs


def runs(options: argparse.Namespace) -> None:
    """Analyse many runs of two points; what both processes hold must not grow."""
    total, ended, whole = 0, 0, 0
    rows: list[tuple[float, ...]] = []

    def stop(name: str, doc: dict[str, Any]) -> None:
        nonlocal ended, whole
        ended += 1
        whole += doc["exit_status"] == "success" and doc["num_events"] == {"primary": 2}

    callback = NanobeamCallback(options.analyzer)
    callback.subscribe(stop, "stop")

    def analyse(count: int) -> None:
        nonlocal total
        for _ in range(count):
            while total - ended >= 8:  # one after the other the worker would mostly wait
                time.sleep(0.002)
            for name, doc in again:
                callback(name, doc)
            total += 1
        callback.wait()
        worker = callback.health.worker_pid
        assert worker is not None
        rows.append((*usage(os.getpid()), *usage(worker)))

    print(f"{options.runs} runs of 2 points, {options.analyzer}")
    print(f"{'':>7} {'callback: MB':>12} threads files {'worker: MB':>11} threads files {'s':>5}")
    with tempfile.TemporaryDirectory() as folder:
        again = Renewed(record(folder, small(128), (1, 2)))
        ready(callback)
        begin = time.perf_counter()
        analyse(300)
        for k in range(11):
            here, there = rows[-1][:3], rows[-1][3:]
            print(
                f"{total:7} {here[0]:12.1f} {here[1]:7} {here[2]:5} {there[0]:11.1f} "
                f"{there[1]:7} {there[2]:5} {time.perf_counter() - begin:5.0f}",
                flush=True,
            )
            if k < 10:
                analyse(options.runs // 10)
        health = callback.health
        callback.close()
    grown = [b - a for a, b in zip(rows[0], rows[-1], strict=True)]
    print(
        f"{ended} derived runs, {ended - whole} not whole, {health.errors} errors; grown by "
        f"{grown[0]:.1f} and {grown[3]:.1f} MB, {grown[1] + grown[4]} threads, "
        f"{grown[2] + grown[5]} files"
    )


# --------------------------------------------------------------------- references


def references(options: argparse.Namespace) -> None:
    """Feed the documents of a very large scan; print the peak memory above idle."""
    for missing, points in ((True, 100), (True, 10), (False, 100)):
        process = multiprocessing.get_context("spawn").Process(
            target=_large_scan, args=(missing, points, options.rows)
        )
        process.start()  # so that each begins with the memory of a fresh process
        process.join()


def _large_scan(missing: bool, points: int, rows: int) -> None:
    logging.disable()
    callback = NanobeamCallback("correlation")
    arrived = np.zeros(rows * 1000 + 1, bool)
    stops: list[dict[str, Any]] = []

    def sink(name: str, doc: dict[str, Any]) -> None:
        if name == "event_page":
            arrived[doc["seq_num"]] = True
        elif name == "stop":
            stops.append(doc)

    callback.subscribe(sink)
    timed = Timed(callback)
    with tempfile.TemporaryDirectory() as folder:
        documents = record(folder, small(128), (1, 1000))
        ready(callback)
        for name, doc in documents:  # to have imported and opened everything once
            callback(name, doc)
        callback.wait()
        stops.clear()
        arrived[:] = False
        idle = usage(os.getpid())[0]
        peak, most = idle, 0
        begin = time.perf_counter()
        for k, (name, doc) in enumerate(_large(documents, rows, points, missing)):
            timed(name, doc)
            if k % 300 == 0:
                # as fast as the callback's thread, or the worker, keeps up with
                while (health := callback.health).documents_pending > 1000 or (
                    not missing and health.points_pending > 20_000
                ):
                    time.sleep(0.005)
                most = max(most, health.points_pending)
                peak = max(peak, usage(os.getpid())[0])
        fed = time.perf_counter() - begin
        while not callback.wait(0.5):
            peak = max(peak, usage(os.getpid())[0])
        peak = max(peak, usage(os.getpid())[0])
        whole = time.perf_counter() - begin
        callback.close()
    timed.microseconds.sort()
    n = len(timed.microseconds)
    print(
        f"{rows} × 1000 points, {points} a document, frames "
        f"{'never come' if missing else 'are there, a file a row'}: peak {peak - idle:.0f} MB "
        f"above idle (must 500); at most {most} points waiting; {n} documents, "
        f"{timed.microseconds[n // 2]:.1f} µs each in the median, "
        f"{timed.microseconds[int(0.999 * n)]:.0f} at 99.9 % (CPU); fed in {fed:.0f} s, all done "
        f"in {whole:.0f} s; {arrived.sum()} points came; {stops[-1]['exit_status']}",
        flush=True,
    )


def _large(
    documents: Documents, rows: int, points: int, missing: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the documents of a scan whose rows all lie in one and the same file."""
    (_, start), (_, stop) = documents[0], documents[-1]
    shape = {"shape": [rows, 1000], "num_points": 1000 * rows, "uid": "large"}
    yield "start", start | shape
    for name, doc in documents[1:-1]:
        if name in ("descriptor", "event"):
            yield name, doc | ({"run_start": "large"} if name == "descriptor" else {})
    of = next(d["descriptor"] for n, d in documents if n == "stream_datum")
    resources = [d for n, d in documents if n == "stream_resource"]
    for row in range(rows):
        for doc in resources if row == 0 or not missing else ():
            uri = doc["uri"] + (".missing" if missing else "")
            yield "stream_resource", doc | {"run_start": "large", "uid": _of(doc, row), "uri": uri}
        for first in range(0, 1000, points):
            for doc in resources:
                begin = first + (1000 * row if missing else 0)
                seq = 1000 * row + first + 1
                uid = _of(doc, 0 if missing else row)
                yield (
                    "stream_datum",
                    {
                        "uid": f"{uid}/{seq}",
                        "stream_resource": uid,
                        "descriptor": of,
                        "indices": {"start": begin, "stop": begin + points},
                        "seq_nums": {"start": seq, "stop": seq + points},
                    },
                )
    yield "stop", stop | {"run_start": "large", "num_events": {"primary": 1000 * rows}}


def _of(resource: dict[str, Any], row: int) -> str:
    return f"{resource['uid']}-{row}"


# ------------------------------------------------------------------------ latency


def latency(options: argparse.Namespace) -> None:
    """Write frames at a steady rate in another process, announce them, and wait for values."""
    points = int(options.seconds * options.hz)
    columns = 300
    points -= points % columns
    arrived = np.full(points + 1, np.nan)
    flags = np.zeros(points + 1, int)
    stops: list[dict[str, Any]] = []

    def sink(name: str, doc: dict[str, Any]) -> None:
        if name == "event_page":
            arrived[doc["seq_num"]] = time.monotonic()
            flags[doc["seq_num"]] = doc["data"]["flags"]
        elif name == "stop":
            stops.append(doc)

    callback = NanobeamCallback(options.analyzer)
    callback.subscribe(sink)
    timed = Timed(callback)
    with tempfile.TemporaryDirectory() as folder:
        documents = record(folder, small(256), (8, 8))
        path, dataset = frames_of(documents)
        chunks = _compressed(path, dataset)
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        ready(callback)
        written = Path(folder) / "written.h5"
        writer = context.Process(
            target=_write, args=(written, dataset, chunks, points, options.hz, sender)
        )
        writer.start()
        sender.close()
        flushed, largest = _announce(timed, documents, written, receiver, points, columns)
        writer.join()
        done = callback.wait(60)
        health = callback.health
        callback.close()
    delay = (arrived - flushed)[1:]
    got = np.isfinite(delay)
    p50, p95 = np.percentile(delay[got], [50, 95]) if got.any() else (np.nan, np.nan)
    twelfths = " ".join(f"{np.nanmax(part):.2f}" for part in np.array_split(delay, 12))
    timed.microseconds.sort()
    size = sum(map(len, chunks)) / len(chunks)
    print(
        f"{options.hz:g} Hz for {options.seconds:g} s, 256 × 256 uint16 bitshuffle-lz4 "
        f"({size:.0f} bytes), {options.analyzer}, a document each 0.1 s: flushed → value "
        f"p50 {p50:.2f}, p95 {p95:.2f}, max {np.nanmax(delay):.2f} s (p95 must 1; max of each "
        f"twelfth {twelfths}); "
        f"{points - got.sum()} of {points} lost, {(flags & Flag.FRAME_MISSING > 0).sum()} without "
        f"a frame, {'done' if done else 'NOT done'}, {stops[-1]['exit_status']}; at most "
        f"{largest['points_pending']} points, {largest['documents_pending']} documents and "
        f"{largest['queue_bytes']} bytes waiting; writer took "
        f"{flushed[-1] - flushed[1]:.1f} s; {health.errors} errors; "
        f"{timed.microseconds[len(timed.microseconds) // 2]:.1f} µs a document (CPU)"
    )


def _compressed(path: Path, dataset: str) -> list[bytes]:
    """Return the frames of a file as chunks of bitshuffle and LZ4."""
    with (
        h5py.File(path) as file,
        h5py.File("chunks", "w", driver="core", backing_store=False) as to,
    ):
        source = file[dataset]
        target = to.create_dataset(
            "d", data=source[:], chunks=(1, *source.shape[1:]), **hdf5plugin.Bitshuffle()
        )
        return [target.id.read_direct_chunk((i, 0, 0))[1] for i in range(len(source))]


def _write(
    path: Path, dataset: str, chunks: list[bytes], points: int, hz: float, told: Connection
) -> None:
    """Write frames at a rate, flush each 10 ms, and tell how many are on disk and since when."""
    with h5py.File(path, "w", libver="latest") as file:
        frames = file.create_dataset(
            dataset,
            (0, 256, 256),
            "<u2",
            maxshape=(None, 256, 256),
            chunks=(1, 256, 256),
            **hdf5plugin.Bitshuffle(),
        )
        motors = [
            file.create_dataset(f"/entry/positions/{m}", (0,), "<f8", maxshape=(None,), chunks=1024)
            for m in ("sample_y", "sample_x")
        ]
        file.swmr_mode = True
        told.send((0, time.monotonic()))
        start = flushed = time.monotonic()
        done = 0
        for k in range(points):
            if (due := start + (k + 1) / hz - time.monotonic()) > 0:
                time.sleep(due)
            frames.resize(k + 1, axis=0)
            frames.id.write_direct_chunk((k, 0, 0), chunks[k % len(chunks)])
            if (now := time.monotonic()) - flushed >= 0.01 or k + 1 == points:
                for motor in motors:
                    motor.resize(k + 1, axis=0)
                    motor[done:] = np.arange(done, k + 1)
                    motor.flush()
                frames.flush()
                done, flushed = k + 1, now
                told.send((done, time.monotonic()))
    told.close()


def _announce(
    callback: Any,
    documents: Documents,
    path: Path,
    told: Connection,
    points: int,
    columns: int,
) -> tuple[np.ndarray, dict[str, int]]:
    """Emit the documents of what is written, ten times a second.

    Return when each point's frame was on disk (points + 1,), and the longest queues.
    """
    flushed = np.full(points + 1, np.nan)
    largest = dict.fromkeys(("points_pending", "documents_pending", "queue_bytes"), 0)
    told.recv()
    shape = {"shape": [points // columns, columns], "num_points": points}
    callback("start", documents[0][1] | shape)
    datums: dict[str, dict[str, Any]] = {}
    for name, doc in documents[1:-1]:
        if name in ("descriptor", "event"):
            callback(name, doc)
        elif name == "stream_resource":
            callback(name, doc | {"uri": f"file://localhost{path}"})
        else:
            datums[doc["stream_resource"]] = doc
    ready, announced, due = 0, 0, time.monotonic()
    while announced < points:
        due += 0.1
        while ready < points and told.poll(max(0.0, due - time.monotonic())):
            stop, when = told.recv()
            flushed[ready + 1 : stop + 1] = when
            ready = stop
        if ready > announced:
            indices = {"start": announced, "stop": ready}
            numbers = {"start": announced + 1, "stop": ready + 1}
            for uid, doc in datums.items():
                datum = {"uid": f"{uid}/{announced}", "indices": indices, "seq_nums": numbers}
                callback("stream_datum", doc | datum)
            announced = ready
        health = callback.callback.health
        for key in largest:
            largest[key] = max(largest[key], getattr(health, key))
    callback("stop", documents[-1][1] | {"num_events": {"primary": points}})
    return flushed, largest


# ------------------------------------------------------------------------- thread

PLAIN = (
    "events with embedded frames",
    "pages with an array of frames",
    "datums, an event a point",
    "streams",
)
"""Dialects in which every fault is tried."""


def thread(options: argparse.Namespace) -> None:
    """Emit recorded runs from a RunEngine's thread; print the time that it spends a document."""
    dialects = runpy.run_path(str(DIALECTS))
    engine = RunEngine(context_managers=[])
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        update = {"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
        geometry = Geometry.published().model_copy(update=update)
        sample = phantom("unique", dialects["SHAPE"])
        sxdm = SimulatedSXDM(sample, geometry, folder, energy_in="start")
        scan = dialects["Scan"](dialects["recorded"](engine, sxdm_fly(sxdm)))
        recorded: dict[str, Documents] = {}
        for i, (name, (device, kwargs, change)) in enumerate(dialects["DIALECTS"].items()):
            flyer = device(scan, Path(folder) / str(i), **kwargs)
            recorded[name] = list(change(dialects["recorded"](engine, dialects["fly"](flyer))))
        print(f"{'fault':18} {'dialect':40} documents {'median':>7} {'99.9 %':>7}  µs (CPU)")
        faults: dict[str, tuple[Any, Callable[[Documents], Documents]]] = {
            name: (CONDITIONS[name], _untrained if name == "no model" else list)
            for name in CONDITIONS
        }
        faults |= {
            "slow sink": (_slow_sink, list),
            "files missing": (healthy, _missing_files),
            "hostile documents": (healthy, _hostile),
        }
        for fault, (condition, change) in faults.items():
            if options.faults and fault not in options.faults:
                continue
            names = {"healthy": tuple(recorded), "no model": PLAIN[-1:]}.get(fault, PLAIN)
            # otherwise the hundreds of runs would take long to open
            analyzer = "auto" if fault == "no model" else "correlation"
            with tempfile.TemporaryDirectory() as other, condition(other, analyzer) as callback:
                ready(callback)
                for name in names:
                    changed = list(change(recorded[name]))
                    _emit(engine, callback, fault, name, changed, options.documents)


def _emit(
    engine: RunEngine,
    callback: NanobeamCallback,
    fault: str,
    name: str,
    documents: Documents,
    wanted: int,
) -> None:
    timed = Timed(callback)
    again = Renewed(documents)
    before = callback.health
    done = threading.Event()

    def emit() -> None:
        while len(timed.microseconds) < wanted:
            for kind, doc in again:
                engine.dispatcher.process(DocumentNames[kind], doc)
                time.sleep(0.0005)  # what the RunEngine needs for a document at least
        done.set()

    token = engine.subscribe(timed)
    engine.loop.call_soon_threadsafe(emit)
    done.wait()
    engine.unsubscribe(token)
    done_too = callback.wait(30)
    found = sorted(timed.microseconds)
    median, late = found[len(found) // 2], found[int(0.999 * len(found))]
    health = callback.health
    points, flagged, errors = (
        getattr(health, key) - getattr(before, key)
        for key in ("points_analysed", "points_flagged", "errors")
    )
    print(
        f"{fault:18} {name:40} {len(found):9} {median:7.1f} {late:7.1f}  {points} points, "
        f"{flagged} flagged, {errors} errors{'' if done_too else ', not done'}"
        f"{'' if median <= 50 and late <= 1000 else ' ✗'}",
        flush=True,
    )


@contextlib.contextmanager
def _slow_sink(folder: str, analyzer: str) -> Iterator[NanobeamCallback]:
    with healthy(folder, analyzer) as callback:
        token = callback.subscribe(lambda name, doc: time.sleep(0.05))
        yield callback
        callback._sinks[token]._callback = lambda name, doc: None


def _untrained(documents: Documents) -> Documents:
    (name, start), *rest = documents
    return [(name, start | {"nanobeam": start["nanobeam"] | {"thickness_nm": 13.0}}), *rest]


def _missing_files(documents: Documents) -> Documents:
    for name, doc in documents:
        for key in ("uri", "resource_path"):
            if key in doc:
                doc = doc | {key: doc[key] + ".missing"}
        yield name, doc


def _hostile(documents: Documents) -> Documents:
    """Add nonsense, and let half of the references lead to where nothing must be read."""
    places = itertools.cycle(["/../../etc/shadow", "/dev/zero", "http://elsewhere/x.h5", "\0"])
    for name, doc in documents:
        yield name, doc
        if name in ("stream_resource", "resource"):
            key = "uri" if "uri" in doc else "resource_path"
            yield name, doc | {key: next(places)}
        elif name != "start":
            yield name, {k: [v] * 3 for k, v in doc.items()}
            yield name, {"uid": doc.get("uid", "?"), "unknown": {"deep": [[[]]] * 50}}
        if name == "stream_datum":
            yield name, doc | {"seq_nums": {"start": 10**9, "stop": 10**12}}


SECTIONS = {"runs": runs, "references": references, "latency": latency, "thread": thread}


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--analyzer", default="auto")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1000, help="of the scan of references")
    parser.add_argument("--hz", type=float, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--faults", nargs="*", help="of thread; all by default")
    parser.add_argument("--documents", type=int, default=5000, help="for each line of thread")
    options = parser.parse_args(None if arguments is None else list(arguments))
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    for name in options.sections or SECTIONS:
        print(f"\n--- {name}", flush=True)
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
