"""The worker process: ``python -m nanobeam_bluesky.worker``.

It reads requests from its standard input and writes answers to its standard output, and
ends with them. A message is a line of JSON followed by the bytes of its arrays; nothing
is pickled.

A process and not a thread, because a thread that computes shares the interpreter lock
with the RunEngine: it cost a paced scan 1.2 %, a process 0.2 %.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.documents.processing import (
    THREADS,
    AnalyzerChoice,
    Processed,
    Processor,
    Task,
)
from nanobeam_bluesky.documents.references import PointBlock, StoredRows
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Estimates

__all__ = [
    "decode_processed",
    "decode_task",
    "encode_processed",
    "encode_task",
    "receive",
    "send",
    "serve",
]

Message = dict[str, Any]
Arrays = list[NDArray[Any]]

_NUMERIC = "biuf"


def send(pipe: IO[bytes], message: Message, arrays: Arrays | None = None) -> None:
    """Write a message and its numeric arrays."""
    arrays = [np.ascontiguousarray(a) for a in arrays or []]
    header = message | {"arrays": [[a.dtype.str, list(a.shape)] for a in arrays]}
    pipe.write(json.dumps(header).encode() + b"\n")
    for array in arrays:
        pipe.write(array.data.cast("B") if array.size else b"")
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[Message, Arrays] | None:
    """Read a message; None where the other side has ended.

    Raises
    ------
    ValueError
        If what came is no message.
    """
    line = pipe.readline()
    if not line.endswith(b"\n"):
        return None
    message: Message = json.loads(line)
    arrays: Arrays = []
    for text, shape in message.pop("arrays"):
        dtype = np.dtype(text)
        if dtype.kind not in _NUMERIC:
            raise ValueError(f"worker message with an array of {dtype}: expected numbers")
        array = np.empty(shape, dtype)
        view = array.data.cast("B") if array.size else memoryview(b"")
        if _fill(pipe, view) < view.nbytes:
            return None
        arrays.append(array)
    return message, arrays


def _fill(pipe: IO[bytes], view: memoryview) -> int:
    done = 0
    while done < view.nbytes:
        count = pipe.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


# ------------------------------------------------------------------------- codec


def encode_task(task: Task) -> tuple[Message, Arrays]:
    """Task → message; arrays hold embedded values."""
    arrays: Arrays = []

    def block(b: PointBlock) -> Message:
        if b.values is not None:
            arrays.append(b.values)
        return {
            "first": b.first,
            "count": b.count,
            "stored": asdict(b.stored) if b.stored else None,
            "values": None if b.values is None else len(arrays) - 1,
            "problem": b.problem,
        }

    message = {
        "run": task.run,
        "number": task.number,
        "frames": [block(b) for b in task.frames],
        "positions": {m: [block(b) for b in blocks] for m, blocks in task.positions.items()},
        "calibrate": task.calibrate,
    }
    return message, arrays


def decode_task(message: Message, arrays: Arrays) -> Task:
    """Message → task."""

    def block(m: Message) -> PointBlock:
        stored = StoredRows(**m["stored"]) if m["stored"] else None
        values = None if m["values"] is None else arrays[m["values"]]
        return PointBlock(m["first"], m["count"], stored, values, m["problem"])

    return Task(
        message["run"],
        message["number"],
        tuple(block(b) for b in message["frames"]),
        {motor: tuple(map(block, blocks)) for motor, blocks in message["positions"].items()},
        message["calibrate"],
    )


def encode_processed(done: Processed) -> tuple[Message, Arrays]:
    """Answer → message; the task itself does not travel back."""
    columns = done.estimates.columns()
    arrays = [done.status, done.position_status, *columns.values(), *done.positions.values()]
    message = {
        "run": done.task.run,
        "number": done.task.number,
        "columns": list(columns),
        "motors": list(done.positions),
        "reason": done.reason,
        "calibration": done.calibration,
    }
    return message, arrays


def decode_processed(message: Message, arrays: Arrays, task: Task) -> Processed:
    """Message → answer to `task`."""
    status, position_status, *rest = arrays
    columns = dict(zip(message["columns"], rest, strict=False))
    positions = dict(zip(message["motors"], rest[len(columns) :], strict=True))
    return Processed(
        task,
        status,
        Estimates(**columns),
        positions,
        position_status,
        message["reason"],
        message["calibration"],
    )


# ------------------------------------------------------------------------- server


def serve(requests: IO[bytes], answers: IO[bytes], threads: int = 1) -> None:
    """Answer requests until the other side ends; tasks on several threads at once.

    What is in work then, or hangs, is not waited for.
    """
    processor = Processor()
    writing = threading.Lock()

    def answer(message: Message, arrays: Arrays | None = None) -> None:
        with writing:
            send(answers, message, arrays)

    def work(task: Task) -> None:
        message, arrays = encode_processed(processor.process(task))
        answer({"kind": "processed"} | message, arrays)

    pool = ThreadPoolExecutor(threads)
    while (received := receive(requests)) is not None:
        message, arrays = received
        kind = message.pop("kind")
        if kind == "task":
            pool.submit(work, decode_task(message, arrays))
        elif kind == "open":
            answer(_open(processor, message))
        elif kind == "close":
            processor.close(message["run"])
    pool.shutdown(wait=False, cancel_futures=True)


def _open(processor: Processor, message: Message) -> Message:
    run = message["run"]
    try:
        settings = processor.open(
            run,
            Geometry.model_validate(message["geometry"]),
            AnalyzerChoice(**message["choice"] | {"fit": tuple(message["choice"]["fit"])}),
        )
    except Exception as error:
        logging.getLogger("nanobeam_bluesky").exception("run %s: no analyzer", run[:8])
        return {"kind": "refused", "run": run, "reason": f"{type(error).__name__}: {error}"}
    return {"kind": "opened", "run": run, "settings": settings}


def _warm_up() -> None:
    """Import and compile before the first run needs it: 20 s once, then from numba's cache."""
    from nanobeam_bluesky.documents.binning import bin_frames
    from nanobeam_bluesky.documents.chunks import ChunkLayout, decompressed
    from nanobeam_bluesky.models import Analyzer

    geometry = Geometry.published()
    for dtype in (np.uint16, np.uint32):  # of most detectors
        patterns, _ = bin_frames(np.ones((1, *geometry.roi_shape), dtype), geometry)
    layout = ChunkLayout(np.dtype(np.uint16), (512, 512), [32008])  # bitshuffle
    with contextlib.suppress(OSError):  # an empty chunk is none, but will do
        decompressed([(0, bytes(12))], layout, geometry.roi)
    Analyzer.for_geometry(geometry).process(patterns)


def main() -> None:
    """Serve on the standard streams."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C pauses the plan, not the analysis
    os.nice(5)  # where cores are few, the scan goes first
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up between the messages
    logging.basicConfig(level=logging.WARNING, format="nanobeam worker: %(message)s")
    try:
        _warm_up()
    except Exception:  # what is wrong with it is better said of each run's points
        logging.getLogger("nanobeam_bluesky").exception("not warmed up")
    send(answers, {"kind": "ready"})
    serve(sys.stdin.buffer, answers, THREADS)
    os._exit(0)  # what trains in the background ends as well, when its pipe does


if __name__ == "__main__":
    main()
