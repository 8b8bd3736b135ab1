"""How a server bears many clients.

    python -m benchmarks.load    # 20 clients at once: lists, maps, rows, PNG, mid-scan

`nanobeam serve` runs in a process of its own, on a folder with one raw scan, its maps and copies
of these. While clients read, another scan's maps are written page by page.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
from bluesky import RunEngine
from tiled.client import from_uri

from benchmarks.soak import Renewed
from nanobeam_bluesky.callbacks import BackgroundSink, NanobeamCallback
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly
from nanobeam_bluesky.tiled_adapters import derived_writer, open_catalog, raw_writer

GEOMETRY = Geometry.published().model_copy(
    update={"detector_shape": (160, 144), "bragg_center_px": (70.0, 80.0)}
)
PAGE_SECONDS = 0.5


def record(folder: Path, shape: tuple[int, int], copies: int) -> tuple[str, list[Any]]:
    """Record a raw scan, its maps and copies of these; return its uid and the maps' documents."""
    client = open_catalog(folder)
    documents: list[Any] = []
    write, sink = derived_writer(client["derived"]), BackgroundSink(raw_writer(client["raw"]))
    callback, engine = NanobeamCallback(), RunEngine({}, context_managers=[])
    callback.subscribe(lambda name, doc: documents.append((name, doc)))
    engine.subscribe(callback)
    engine.subscribe(sink)
    (uid,) = engine(sxdm_fly(SimulatedSXDM(phantom("film", shape), GEOMETRY, folder / "frames")))
    callback.wait(300)
    callback.close()
    sink.close(60)
    again = Renewed(documents)
    for run in (documents, *(again for _ in range(copies))):
        for name, doc in run:
            write(name, doc)
    client.context.close()
    return uid, documents


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, dict[str, str], int]]:
    """Serve a folder; yield address, headers with the key, and the server's process id."""
    command = [sys.executable, "-m", "nanobeam_bluesky.cli", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        base, _, key = words[-1].partition("?api_key=")
        try:
            yield base, {"Authorization": f"Apikey {key}"}, process.pid
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def rss_mb(pid: int) -> float:
    """Return the memory that a process has, MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def load(clients: int = 20, seconds: float = 60, shape: tuple[int, int] = (41, 41)) -> int:
    """Let clients ask for lists, maps, rows, PNGs and a running scan; return how many failed."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        rows = shape[0]
        raw, documents = record(folder, shape, copies=100)
        base, headers, pid = stack.enter_context(served(folder))
        done, running = threading.Event(), [""]
        times: dict[str, list[float]] = {}
        failures: list[str] = []

        def write() -> None:
            client = from_uri(f"{base}?api_key={headers['Authorization'].split()[1]}")
            writer, again = derived_writer(client["derived"]), Renewed(documents)
            while not done.is_set():
                for kind, doc in again:
                    writer(kind, doc)
                    if kind == "start":
                        running[0] = doc["uid"]
                    if kind == "event_page":
                        done.wait(PAGE_SECONDS)
            client.context.close()

        def read(seed: int) -> None:
            choose = random.Random(seed)
            api = f"{base}/api/v1"
            with httpx.Client(headers=headers, timeout=60) as client:
                listed = client.get(f"{api}/search/maps?page[limit]=100").json()["data"]
                maps = [item["id"] for item in listed]
                while not done.is_set():
                    field = choose.choice(("strain", "omega", "chi", "counts"))
                    asked = {
                        "list": "search/maps?page[limit]=100",
                        "map": f"array/full/maps/{choose.choice(maps)}/{field}",
                        "row": f"array/full/scans/{raw}/patterns?slice={choose.randrange(rows)}",
                        "PNG": f"array/full/maps/{choose.choice(maps)}/{field}?format=image/png",
                        "mid-scan": f"array/full/maps/{running[0] or maps[0]}/{field}",
                    }
                    kind = choose.choice(list(asked))
                    before = time.perf_counter()
                    try:
                        answer = client.get(f"{api}/{asked[kind]}")
                        if answer.status_code != 200:
                            failures.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
                    except httpx.HTTPError as error:
                        failures.append(f"{kind}: {type(error).__name__}: {error}")
                    times.setdefault(kind, []).append(time.perf_counter() - before)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(clients)]
        threads.append(threading.Thread(target=write))
        for thread in threads:
            thread.start()
        memory = [rss_mb(pid)]
        for _ in range(4):
            time.sleep(seconds / 4)
            memory.append(rss_mb(pid))
        done.set()
        for thread in threads:
            thread.join()
    total = sum(map(len, times.values()))
    print(f"{clients} clients: {total / seconds:.0f} requests/s, {len(failures)} failed")
    print("server's memory, MB, at the start and each quarter:", *(f"{m:.0f}" for m in memory))
    for kind, found in sorted(times.items()):
        middle, late = (1e3 * statistics.quantiles(found, n=20)[at] for at in (9, 18))
        print(f"{kind:9} {len(found):6} requests, median {middle:5.0f} ms, 95 % {late:5.0f} ms")
    for failure in sorted(set(failures))[:10]:
        print("failed:", failure)
    return len(failures)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args(None if arguments is None else list(arguments))
    sys.exit(1 if load(options.clients, options.seconds) else 0)


if __name__ == "__main__":
    main()
