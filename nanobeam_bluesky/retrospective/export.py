"""A derived run of a catalogue as a file: what ``nanobeam export`` does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from tiled.client.container import Container
from tiled.client.utils import ClientError

from nanobeam_bluesky import export
from nanobeam_bluesky.documents import FrameReader, to_maps
from nanobeam_bluesky.geometry import ROI
from nanobeam_bluesky.presets import Preset
from nanobeam_bluesky.retrospective.runs import (
    NoRunError,
    catalog_of_raw,
    find_derived,
    plain,
    scan_of,
)

__all__ = ["SUFFIXES", "export_run"]

SUFFIXES = {
    "nexus": ".nxs",
    "png": ".png",
    "csv": ".csv",
    "tiff": ".tiff",
    "zarr": ".zarr",
    "html": ".html",
    "md": ".md",
}
"""Of the default names, by format."""


def export_run(
    catalog: Container,
    uid: str,
    to: str,
    out: Path | str = "",
    *,
    frames: bool = False,
    preset: str = "auto",
    force: bool = False,
) -> Path:
    """Write a derived run to a file, which is there once it is complete.

    Parameters
    ----------
    catalog
        Of `find_catalog`.
    uid
        As for `find_derived`.
    to
        A key of `SUFFIXES`.
    out
        The file; or a folder, the current one if absent, for one named after scan and uid. A
        Zarr store is a folder, or one file if `out` ends in ``.zip``.
    frames
        Put the detector frames of the raw run into the NeXus file too; `preset` tells which
        those are.
    force
        Take the place of a file that is there.

    Returns
    -------
    path
        Of the file.

    Raises
    ------
    FileExistsError
        If it is there, without `force`.
    OSError
        If it cannot be written, or the run not be read.
    ValueError
        If there is no such run, or it has no maps, or no frames where these are wanted.
    """
    try:
        run = find_derived(catalog, uid)
        start, stop = plain(run.metadata["start"]), plain(run.metadata.get("stop"))
        path = Path(out)
        if path.is_dir() and not (path / ".zgroup").exists():
            path /= _name(start) + SUFFIXES[to]
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent}")
        if os.path.lexists(path) and not force:
            raise FileExistsError(f"{path} is there already; take its place with --force")
        maps = to_maps(run)
        with _replacing(path) as part:
            if frames:
                with _frames(catalog, start, preset) as found:
                    export.write_nexus(part, maps, start, stop, frames=found)
            else:
                _write(part, to, maps, start, stop)
    except ClientError as error:
        raise OSError(str(error)) from None
    return path


def _name(start: Mapping[str, Any]) -> str:
    number = start["nanobeam"].get("original_scan_id")
    uid = str(start["uid"])[:8]
    return f"scan_{number}_{uid}" if isinstance(number, int) else uid


def _write(
    path: Path,
    to: str,
    maps: xr.Dataset,
    start: Mapping[str, Any],
    stop: Mapping[str, Any] | None,
) -> None:
    match to:
        case "nexus":
            export.write_nexus(path, maps, start, stop)
        case "zarr":
            export.write_zarr(path, maps, start, stop)
        case "png":
            path.write_bytes(export.to_png(maps, title=export.run_title(start)))
        case "csv":
            path.write_bytes(export.to_csv(maps))
        case "tiff":
            path.write_bytes(export.to_tiff(maps))
        case "html" | "md":
            report = export.Report(maps, start, stop)
            text = report.html() if to == "html" else report.markdown()
            path.write_text(text, "utf-8", "replace")
        case _:
            raise ValueError(f"{to!r}: expected one of {', '.join(SUFFIXES)}")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a place to write to; when all is there, it takes the place of what was."""
    folder = Path(tempfile.mkdtemp(prefix=".nanobeam-", dir=path.parent))
    try:
        part, old = folder / path.name, folder / f"{path.name}.old"
        yield part
        if path.is_dir() or (part.is_dir() and path.exists()):  # of these none can be replaced
            os.replace(path, old)
        os.replace(part, path)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _frames(catalog: Container, start: Mapping[str, Any], preset: str) -> Iterator[export.Frames]:
    """Frames of a derived run's raw run, read row by row as they are asked for."""
    uid = start["original_run_uid"]
    raw = catalog_of_raw(catalog).get(uid)
    if raw is None:
        raise NoRunError(f"no frames: its raw run {uid} is not in the catalogue")
    begin = plain(raw.metadata["start"])
    matching = next((p for p in Preset.choices(preset) if p.matches(begin)), None)
    if matching is None:
        raise NoRunError(f"no frames: preset {preset!r} does not match raw run {uid[:8]}")
    reader = FrameReader(refresh=False)  # a view of this process may have read the same files
    try:
        scan = scan_of(raw, matching, {}, reader)
        rows, cols = (np.arange(n) for n in scan.grid.scan.shape)
        height, width = scan.frame_shape
        roi = ROI(row=0, col=0, height=height, width=width)
        each = (scan.frames(rows[i : i + 1], cols, roi)[0] for i in range(len(rows)))
        yield export.Frames((len(rows), len(cols), height, width), scan.dtype, each)
    finally:
        reader.close()
