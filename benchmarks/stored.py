"""Stored runs: what `analyze` adds to the analysis, and what a second worker brings.

    python -m benchmarks.stored [overhead] [cluster] [--scans 100]

``overhead``: a scan of 165 × 165 points from a catalogue to maps in it, beside the same patterns
read and analysed on as many threads (must 1.1 ×).
``cluster``: 100 scans of 64 × 64 points, bitshuffle-LZ4 frames of 128 × 128, on a Dask cluster of
this machine with one worker and with two (must 1.7 ×), and again with a worker and then the
client killed midway: every scan must have one complete derived run, equal to the undisturbed one.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from distributed import Client
from distributed.deploy.subprocess import SubprocessCluster
from tiled.client.container import Container

from benchmarks.accuracy import Table, cell, missed
from benchmarks.pipeline import Documents, compress, frames_of, record
from nanobeam_bluesky import Geometry, analyze, to_maps
from nanobeam_bluesky.documents import FrameReader, PointBlock, StoredRows
from nanobeam_bluesky.documents.pipeline import TASK_POINTS
from nanobeam_bluesky.documents.processing import THREADS
from nanobeam_bluesky.models import Analyzer
from nanobeam_bluesky.retrospective.analysis import Analysis
from nanobeam_bluesky.tiled_adapters import open_catalog, raw_writer

OVERHEAD = 1.1
GAIN = 1.7
SIDE = 165
SMALL = Geometry.published().model_copy(
    update={"detector_shape": (128, 128), "bragg_center_px": (64.0, 64.0)}
)


def store(catalog: Container, documents: Documents) -> None:
    """Record a run."""
    write = raw_writer(catalog["raw"])
    for name, doc in documents:
        write(name, doc)


def overhead(folder: Path) -> None:
    """Compare with reading and analysing alone."""
    geometry = Geometry.published()
    documents = record(str(folder / "frames"), geometry, (SIDE, SIDE))
    catalog = open_catalog(folder)
    store(catalog, documents)
    path, dataset = frames_of(documents)
    blocks = [
        PointBlock(i + 1, min(TASK_POINTS, SIDE**2 - i), StoredRows(str(path), dataset, i))
        for i in range(0, SIDE**2, TASK_POINTS)
    ]
    torch.set_num_threads(1)
    analyzer, reader = Analyzer.for_geometry(geometry), FrameReader(geometry)
    ratios, alone, all_of_it = [], [], []
    for turn in range(4):
        begun = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda block: analyzer.process(reader.patterns(block)[0]), blocks))
        middle = time.perf_counter()
        (result,) = analyze(catalog, redo=True)
        assert result.status == "success", result
        end = time.perf_counter()
        if turn:  # the first one compiles
            alone.append(middle - begun)
            all_of_it.append(end - middle)
            ratios.append((end - middle) / (middle - begun))
    reader.close()
    ratio = float(np.median(ratios))
    table = Table("165 × 165 points, 512 × 512 uint16", "analysis, s", "analyze(), s", "ratio")
    table.row(
        f"{THREADS} threads, median of {len(ratios)}",
        f"{np.median(alone):.2f}",
        f"{np.median(all_of_it):.2f}",
        cell(ratio, ".3f", ratio <= OVERHEAD),
    )
    catalog.context.close()


def scans(folder: Path, count: int) -> Container:
    """Store scans: the same frames under other names."""
    documents = record(str(folder / "frames"), SMALL, (64, 64))
    path, dataset = frames_of(documents)
    compress(path, dataset, "uint16")
    catalog = open_catalog(folder)
    for number in range(count):
        own = folder / "frames" / f"scan_{number}.h5"
        shutil.copy(path, own)
        fresh = {
            doc["uid"]: str(uuid.uuid4()) for _, doc in documents if isinstance(doc["uid"], str)
        }

        def renamed(value: Any, fresh: dict[str, str] = fresh, own: Path = own) -> Any:
            if isinstance(value, dict):
                return {k: renamed(v) for k, v in value.items()}
            if isinstance(value, str):
                head, _, tail = value.partition("/")
                return fresh.get(value, fresh[head] + "/" + tail if head in fresh else value)
            return value

        store(
            catalog,
            [
                (
                    name,
                    renamed(doc) | ({"uri": f"file://localhost{own}"} if "uri" in doc else {}),
                )
                for name, doc in documents
            ],
        )
    return catalog


@contextmanager
def workers(count: int) -> Any:
    """Give the client of a Dask cluster whose workers have compiled all they need."""
    cluster = SubprocessCluster(n_workers=count, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(count)
        yield client


def once(results: Iterable[Analysis], catalog: Container, to: Container) -> dict[str, Any]:
    """Return the maps of each run; there must be one complete derived run of each."""
    for result in results:
        assert result.status in ("success", "done"), result
    found: dict[str, Any] = {}
    for run in to["derived"].values():
        if run.metadata.get("stop") is not None:
            raw = run.metadata["start"]["original_run_uid"]
            assert raw not in found, f"{raw} was analysed twice"
            assert run.metadata["stop"]["num_events"]["primary"] == 4096
            found[raw] = to_maps(run)
    assert set(found) == set(catalog["raw"])
    return found


def timed(folder: Path, catalog: Container, count: int) -> tuple[float, dict[str, Any]]:
    """Analyse all scans on so many workers."""
    to = open_catalog(folder / f"workers_{count}")
    with workers(count) as client:
        first = next(iter(catalog["raw"]))
        list(analyze(catalog["raw"][first], to=folder / "warm", scheduler=client, redo=True))
        begun = time.perf_counter()
        results = list(analyze(catalog, to=to, scheduler=client))
        seconds = time.perf_counter() - begun
    maps = once(results, catalog, to)
    to.context.close()
    return seconds, maps


def killed(folder: Path, catalog: Container, seconds: float, expected: dict[str, Any]) -> str:
    """Kill a worker, then the client; begin again."""
    out = folder / "killed"
    command = [sys.executable, "-m", "nanobeam_bluesky.cli", "analyze", "--catalog", str(folder)]
    with workers(2) as client:
        address = client.scheduler.address
        pids = list(client.run(os.getpid).values())
        process = subprocess.Popen(
            [*command, "--to", str(out), "--scheduler", address], stdout=subprocess.DEVNULL
        )
        time.sleep(0.3 * seconds)
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(0.3 * seconds)
        process.kill()
        process.wait()
        to = open_catalog(out)
        done = sum(run.metadata.get("stop") is not None for run in to["derived"].values())
        results = list(analyze(catalog, to=to, scheduler=client))
    for raw, maps in once(results, catalog, to).items():
        for name in ("strain", "omega", "chi"):
            assert np.array_equal(maps[name], expected[raw][name], equal_nan=True)
    to.context.close()
    return f"{done} of {len(expected)} were done when the client was killed"


def cluster(folder: Path, count: int) -> None:
    """One worker, two, and two that are disturbed."""
    catalog = scans(folder, count)
    table = Table(f"{count} scans of 64 × 64, LZ4", "s", "points/s", "gain", "the same")
    one, maps = timed(folder, catalog, 1)
    table.row("one worker", f"{one:.1f}", f"{count * 4096 / one:.0f}", "", "")
    two, others = timed(folder, catalog, 2)
    same = all(
        np.array_equal(maps[raw][name], others[raw][name], equal_nan=True)
        for raw in maps
        for name in ("strain", "omega", "chi")
    )
    table.row(
        "two workers",
        f"{two:.1f}",
        f"{count * 4096 / two:.0f}",
        cell(one / two, ".2f", one / two >= GAIN),
        str(same) if same else "False ✗",
    )
    print(f"A worker and the client killed: {killed(folder, catalog, two, maps)}; all equal.")
    catalog.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["overhead", "cluster"])
    parser.add_argument("--scans", type=int, default=100)
    arguments = parser.parse_args()
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            if part == "overhead":
                overhead(Path(folder))
            else:
                cluster(Path(folder), arguments.scans)
    print(f"\n{len(missed)} rows miss a must" if missed else "\nAll musts are met.")


if __name__ == "__main__":
    main()
