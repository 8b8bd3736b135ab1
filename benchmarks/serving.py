"""How fast a folder is served over HTTP, beside what Tiled itself does with the same numbers.

    python -m benchmarks.serving [maps] [rows] [list]

``maps``: a map of 165 × 165 points, beside the same array in Tiled's own storage (must 1.3 ×).
``rows``: a row of 165 patterns of 64 × 64, beside Tiled's HDF5 adapter on the same frames, whole
or cut to the ROI (must 10 ×).
``list``: the list of 1000 runs (must 1 s).

Medians of requests that take turns; only ratios of one run tell.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tiled.client import from_uri
from tiled.client.container import Container
from tiled.structures.core import Spec

from benchmarks.accuracy import Table, cell, missed
from benchmarks.pipeline import compress, frames_of, record
from nanobeam_bluesky.documents import ScanGrid
from nanobeam_bluesky.documents.derived_run import DerivedRun
from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models import Estimates
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.tiled_adapters import derived_writer, raw_writer, serve

SIDE = 165
ROWS = 3
RUNS = 1000
REQUESTS = 15
SLOW_REQUESTS = 4
MAP_RATIO = 1.3
ROW_RATIO = 10.0
LIST_SECONDS = 1.0
GEOMETRY = Geometry.published()


def medians(*requests: Callable[[], object], times: int = REQUESTS) -> list[float]:
    """Seconds of requests that take turns."""
    taken: list[list[float]] = [[] for _ in requests]
    for turn in range(times + 1):
        for request, each in zip(requests, taken, strict=True):
            begun = time.perf_counter()
            request()
            if turn:  # the first one fills caches
                each.append(time.perf_counter() - begun)
    return [statistics.median(each) for each in taken]


def maps(client: Container, http: httpx.Client) -> None:
    """Compare a closed map with an array."""
    raw = {
        "uid": "benchmark",
        "shape": [SIDE, SIDE],
        "snaking": [False, True],
        "motors": ["y", "x"],
        "extents": [[0, 1], [0, 1]],
    }
    grid = ScanGrid(Preset.load("default").scan_metadata(raw))
    run = DerivedRun(raw, GEOMETRY, grid, {})
    numbers = np.arange(SIDE**2) + 1
    estimates = Estimates.empty(len(numbers))
    estimates.strain[:] = np.random.default_rng(0).normal(size=len(numbers))
    positions = dict(zip(grid.scan.motors, grid.nominal(numbers), strict=True))
    write = derived_writer(client["derived"])
    for name, doc in (*run.open(), run.page(numbers, estimates, positions)):
        write(name, doc)
    write(*run.close("success", ""))
    ours = f"/array/full/maps/{run.uid}/strain"
    image = np.frombuffer(http.get(ours).content).reshape(SIDE, SIDE)
    client["raw"].write_array(image, key="array")
    theirs = "/array/full/raw/array"
    assert http.get(theirs).content == image.tobytes()
    a, b = medians(lambda: http.get(ours), lambda: http.get(theirs), times=4 * REQUESTS)
    table = Table("map of 165 × 165 points", "ms", "Tiled's, ms", "ratio")
    table.row("float64", f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", cell(a / b, ".2f", a / b <= MAP_RATIO))


def rows(client: Container, http: httpx.Client, folder: Path) -> None:
    """Compare patterns with what Tiled's adapter reads of their frames."""
    table = Table(
        "row of 165 patterns of 64 × 64", "ms", "Tiled, frames", "ratio", "Tiled, ROI", "ratio"
    )
    roi = GEOMETRY.roi
    region = f"{roi.row}:{roi.row + roi.height},{roi.col}:{roi.col + roi.width}"
    for kind in ("raw", "bitshuffle-LZ4"):
        documents = record(str(folder / kind), GEOMETRY, (ROWS, SIDE))
        if kind != "raw":
            compress(*frames_of(documents), "uint16")
        write = raw_writer(client["raw"])
        for name, doc in documents:
            write(name, doc)
        uid = documents[0][1]["uid"]
        frames = f"/array/full/raw/{uid}/primary/sxdm_image?slice={SIDE}:{2 * SIDE}"
        ours, whole, cut = medians(
            lambda uid=uid: http.get(f"/array/full/scans/{uid}/patterns?slice=1"),
            lambda frames=frames: http.get(frames),
            lambda frames=frames: http.get(f"{frames},{region}"),
            times=SLOW_REQUESTS,
        )
        table.row(
            f"512×512 uint16, {kind}",
            f"{1e3 * ours:.1f}",
            f"{1e3 * whole:.0f}",
            cell(whole / ours, ".1f", whole / ours >= ROW_RATIO),
            f"{1e3 * cut:.0f}",
            f"{cut / ours:.1f}",
        )


def listed(client: Container, http: httpx.Client) -> None:
    """Time Tiled's client, and the first page of its web UI."""
    metadata = {
        "start": {
            "original_run_uid": "benchmark",
            "shape": [SIDE, SIDE],
            "snaking": [False, True],
            "motors": ["y", "x"],
        }
    }
    specs = [Spec("BlueskyRun", "3.0")]
    for number in range(RUNS):
        one = {"start": metadata["start"] | {"uid": f"run-{number}", "time": float(number)}}
        client["derived"].create_container(f"run-{number}", metadata=one, specs=specs)
    page = "page[limit]=100&sort=-time"

    def pages(tree: str) -> None:
        """Follow the list to its end."""
        following: str | None = f"/search/{tree}?{page}"
        while following:
            following = http.get(following).json()["links"]["next"]

    table = Table(f"list of {RUNS} runs", "s", "Tiled's, s", "ratio")
    for what, of in (
        ("first 100, as of the web page", lambda tree: http.get(f"/search/{tree}?{page}")),
        ("uids, by Tiled's client", lambda tree: list(client[tree])),
        ("all metadata (reported)", pages),
    ):
        ours, theirs = medians(lambda: of("maps"), lambda: of("derived"), times=SLOW_REQUESTS)  # noqa: B023
        ok = ours <= LIST_SECONDS or "reported" in what
        table.row(what, cell(ours, ".2f", ok), f"{theirs:.2f}", f"{ours / theirs:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", default=["maps", "rows", "list"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve(folder) as url:
            base, key = url.split("?api_key=")
            client: Any = from_uri(url)
            headers = {"Authorization": f"Apikey {key}"}
            with httpx.Client(
                base_url=f"{base}/api/v1",
                headers=headers | {"Accept": "application/octet-stream, application/json"},
                timeout=60,
                event_hooks={"response": [lambda r: r.raise_for_status()]},
            ) as http:
                if "maps" in options.sections:
                    maps(client, http)
                if "rows" in options.sections:
                    rows(client, http, folder / "frames")
                if "list" in options.sections:
                    listed(client, http)
    print(f"\n{len(missed)} rows miss a must")
    for row in missed:
        print(" ", row)


if __name__ == "__main__":
    main()
