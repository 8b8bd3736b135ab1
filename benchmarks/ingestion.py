"""Files of beamlines: how long `nanobeam ingest` takes for a scan of 165 × 165 points.

    python -m benchmarks.ingestion

The whole command, in a new process and to a new catalogue, for each layout (must 5 s).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import tifffile

from benchmarks.accuracy import Table, cell, missed
from tests.retrospective import test_ingest_layouts as layouts

SECONDS = 5.0
SHAPE = 165, 165
POINTS = SHAPE[0] * SHAPE[1]


def written(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Write a scan in each layout: its name, what is ingested, whether that tells the shape."""
    rng = np.random.default_rng(0)
    cut = rng.poisson(3, (POINTS, 64, 64)).astype(np.uint16)
    np.save(folder / "exp_data.npy", cut)
    yield "NumPy", folder / "exp_data.npy", False
    with h5py.File(folder / "scan.h5", "w") as file:
        file["any/path/frames"] = cut
    yield "HDF5", folder / "scan.h5", False
    del cut
    frames = np.zeros((POINTS, layouts.HEIGHT, layouts.WIDTH), np.uint8)
    mask = np.zeros(frames.shape[1:], np.uint32)
    yield "NeXus", layouts.write_nexus(folder / "scan.nxs", frames, mask, SHAPE), True
    yield "NanoMAX", layouts.write_nanomax(folder / "000041.h5", frames, SHAPE), True
    (folder / "bliss").mkdir()
    yield "BLISS", layouts.write_bliss(folder / "bliss", frames, shape=SHAPE), True
    del frames
    image = folder / "image.tif"
    tifffile.imwrite(image, rng.poisson(3, (516, 516)).astype(np.int32))
    for name, prefix in (("series", "img"), ("images/123", "scan_123_img")):
        (folder / name).mkdir(parents=True)
        for number in range(POINTS):  # names of one file, which is not opened
            os.link(image, folder / name / f"{prefix}_{number + 1:06d}.tif")
    yield "TIFF", folder / "series", False
    yield "APS 26-ID", layouts.write_mda(folder / "123.mda", shape=SHAPE), True


def main() -> None:
    """Print a row for each layout."""
    table = Table("27 225 points", "s", "frames, MB", "catalogue, MB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        geometry = folder / "film.toml"
        values = layouts.GEOMETRY | {"bragg_center_px": [32.0, 32.0]}
        optics = values.pop("optics")
        lines = [f"{k} = {v!r}" for k, v in values.items()]
        lines += ["[optics]", *(f"{k} = {v!r}" for k, v in optics.items())]
        geometry.write_text("\n".join(lines))
        for layout, path, has_shape in written(folder):
            to = folder / f"catalogue {layout}"
            command = [sys.executable, "-m", "nanobeam_bluesky.cli", "ingest", str(path)]
            command += ["--geometry", str(geometry), "--to", str(to)]
            begun = time.perf_counter()
            done = subprocess.run(
                command + ["--shape", "165,165"] * (not has_shape), capture_output=True, text=True
            )
            seconds = time.perf_counter() - begun
            assert done.returncode == 0 and "27225 points" in done.stdout, done
            table.row(layout, cell(seconds, ".1f", seconds <= SECONDS), size(path), size(to))
    print(f"\n{len(missed)} rows miss a must" if missed else "\nAll musts are met.")


def size(path: Path) -> str:
    """Of a file, or of all in a folder, in MB."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return f"{sum(p.stat().st_size for p in files) / 1e6:.1f}"


if __name__ == "__main__":
    main()
