"""Points a second from frames on disk (in the page cache) to derived events, and what limits it.

A scan of the simulated beamline is recorded once; its documents are then given to a callback as
fast as it takes them. Each stage is also run alone, on as many threads as the worker has; the
whole should reach 80 % of one over the sum of their times.

    python -m benchmarks.pipeline [--shape 64 64] [--repeat 3]
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import h5py
import hdf5plugin
import numpy as np
import torch
from bluesky import RunEngine

from nanobeam_bluesky.callbacks import NanobeamCallback
from nanobeam_bluesky.documents.derived_run import DerivedRun
from nanobeam_bluesky.documents.frames import FrameReader
from nanobeam_bluesky.documents.pipeline import PAGE_POINTS, TASK_POINTS
from nanobeam_bluesky.documents.processing import THREADS
from nanobeam_bluesky.documents.references import PointBlock, StoredRows
from nanobeam_bluesky.documents.scan_grid import ScanGrid
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Analyzer, Estimates
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.sim import SimulatedSXDM, phantom, sxdm_fly

MUST = {"network": 5000, "refine": 2000}
PART = 0.8
Documents = list[tuple[str, dict[str, Any]]]


def record(folder: str, geometry: Geometry, shape: tuple[int, int]) -> Documents:
    """Fly a scan; one HDF5 file of its frames, and its documents."""
    documents: Documents = []
    RE = RunEngine(context_managers=[])
    RE.subscribe(lambda name, doc: documents.append((name, doc)))
    RE(sxdm_fly(SimulatedSXDM(phantom("figure3", shape), geometry, folder), dwell_s=0))
    return documents


def frames_of(documents: Documents) -> tuple[Path, str]:
    """File and dataset of the frames."""
    for name, doc in documents:
        if name == "stream_resource" and doc["parameters"]["dataset"] == "/entry/data/data":
            return Path(doc["uri"].removeprefix("file://localhost")), doc["parameters"]["dataset"]
    raise RuntimeError("no frames in these documents")


def compress(path: Path, dataset: str, dtype: str) -> None:
    """Rewrite a file with bitshuffle and LZ4, and with other numbers."""
    part = path.with_suffix(".part")
    with h5py.File(path) as old, h5py.File(part, "w") as new:
        source = old[dataset]
        target = new.create_dataset(
            dataset, source.shape, dtype, chunks=source.chunks, **hdf5plugin.Bitshuffle()
        )
        for first in range(0, len(source), 64):
            target[first : first + 64] = source[first : first + 64]
        old.copy("/entry/positions", new, "/entry/positions")
    part.replace(path)


def rate(work: Callable[[Any], object], items: Iterable[Any], points: int, repeat: int) -> float:
    """Points a second of a stage alone, on the worker's number of threads."""
    items, best = list(items), np.inf
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(repeat):
            start = time.perf_counter()
            list(pool.map(work, items))
            best = min(best, time.perf_counter() - start)
    return points / best


def whole(documents: Documents, analyzer: str, points: int, repeat: int) -> float:
    """Points a second from the first document to the derived run's stop."""
    callback = NanobeamCallback(analyzer)
    stops: list[dict[str, Any]] = []
    callback.subscribe(lambda name, doc: stops.append(doc), "stop")
    while not callback.health.worker_ready:
        time.sleep(0.1)
    best = np.inf
    for _ in range(repeat + 1):  # the first one opens and compiles
        stops.clear()
        start = time.perf_counter()
        for name, doc in documents:
            callback(name, doc)
        callback.wait()
        best = min(best, time.perf_counter() - start)
        if stops[-1]["num_events"]["primary"] != points or stops[-1].get("reason"):
            raise RuntimeError(f"the derived run is not whole: {stops[-1]}")
    callback.close()
    return points / best


def stages(documents: Documents, geometry: Geometry, points: int, repeat: int) -> dict[str, float]:
    """Points a second of every stage alone."""
    path, dataset = frames_of(documents)
    blocks = [
        PointBlock(
            first + 1, min(TASK_POINTS, points - first), StoredRows(str(path), dataset, first)
        )
        for first in range(0, points, TASK_POINTS)
    ]
    reader = FrameReader(geometry)
    found = {"read and bin": rate(reader.patterns, blocks, points, repeat)}
    patterns = [reader.patterns(block)[0] for block in blocks]
    reader.close()
    network = Analyzer.for_geometry(geometry, method="network")
    refine = Analyzer.for_geometry(geometry)
    found["network"] = rate(network.process, patterns, points, repeat)
    both = rate(refine.process, patterns, points, repeat)
    found["refinement"] = 1 / max(1 / both - 1 / found["network"], 1e-9)
    start = documents[0][1]
    grid = ScanGrid(Preset.load("default").scan_metadata(start))
    derived = DerivedRun(start, geometry, grid, network.settings, {})
    list(derived.open())
    estimates = Estimates.concatenate([network.process(p) for p in patterns])

    def page(first: int) -> None:
        numbers = np.arange(first, min(first + PAGE_POINTS, points)) + 1
        nominal = dict(zip(grid.scan.motors, grid.nominal(numbers), strict=True))
        derived.page(numbers, estimates.select(numbers - 1), nominal)

    found["event pages"] = rate(page, range(0, points, PAGE_POINTS), points, repeat)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(64, 64))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    published, points = Geometry.published(), math.prod(options.shape)
    big = published.model_copy(update={"detector_shape": (1065, 1030)})
    for geometry, dtype, compressed in (
        (published, "uint16", False),
        (published, "uint16", True),
        (big, "uint32", True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            documents = record(folder, geometry, tuple(options.shape))
            if compressed:
                compress(*frames_of(documents), dtype)
            rows, columns = geometry.detector_shape or (0, 0)
            print(
                f"\n{columns}×{rows} {dtype}, {'bitshuffle-lz4' if compressed else 'raw'}, "
                f"{points} points, {THREADS} threads; points/s alone:"
            )
            alone = stages(documents, geometry, points, options.repeat)
            print("  " + ", ".join(f"{stage} {value:.0f}" for stage, value in alone.items()))
            for analyzer, must in MUST.items():
                used = {k: v for k, v in alone.items() if k != "refinement" or analyzer == "refine"}
                possible = 1 / sum(1 / v for v in used.values())
                measured = whole(documents, analyzer, points, options.repeat)
                good = measured >= PART * possible and (compressed or measured >= must)
                print(
                    f"  {analyzer}: {measured:.0f} points/s, {measured / possible:.2f} of "
                    f"{possible:.0f} (must {PART}{'' if compressed else f', {must}'})"
                    f"{'' if good else ' ✗'}; limited by {min(used, key=lambda k: used[k])}"
                )


if __name__ == "__main__":
    main()
