"""Readers of plain files: each knows one layout, and says what scans a file holds.

A reader is a function ``read(path, options)`` under an entry point of the group
``nanobeam.readers``. It returns the scans of a file or folder, or None if that has another layout;
it opens as little as it can, and raises `ValueError` or `OSError` where a file of its layout is
damaged, or does not say what is needed. See ``docs/reference/ingest.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

__all__ = ["Frames", "Motor", "Options", "PlainScan", "Reader", "find_scans", "readers"]

BUILT_IN = ("aps26id", "bliss", "nanomax", "nexus", "hdf5", "npy", "tiff")
"""Order in which they are tried, after all others: what matches fewer files comes first."""


@dataclass(frozen=True)
class Options:
    """What the user says of all files."""

    shape: tuple[int, int] | None = None
    """Rows and columns of the scan, e.g. (165, 165)."""
    dataset: str | None = None
    """The frames in an HDF5 file, e.g. "/entry/data/data"."""


@dataclass(frozen=True)
class Frames:
    """Where frames of consecutive points lie; as a stream_resource document says it."""

    path: str
    """A file, or a folder, which ends in "/"."""
    mimetype: str
    """E.g. "application/x-hdf5"."""
    parameters: Mapping[str, Any]
    """E.g. {"dataset": "/entry/data/data"}."""
    count: int
    """Number of frames, one a point, e.g. 27225."""
    shape: tuple[int, int]
    """Rows and columns of a frame, e.g. (516, 516)."""
    dtype: np.dtype[Any]

    @property
    def resource(self) -> dict[str, Any]:
        """What a stream_resource document says of them."""
        uri = f"file://localhost{quote(self.path)}"
        return {"uri": uri, "mimetype": self.mimetype, "parameters": dict(self.parameters)}


@dataclass(frozen=True)
class Motor:
    """Measured positions of a scan motor."""

    name: str
    values: NDArray[np.float64]
    """In scan order (points,); NaN where unknown."""
    units: str = ""
    """E.g. "um"."""
    dataset: tuple[str, str] | None = None
    """HDF5 file and dataset (n,) that they are from: then they are not copied."""


@dataclass(frozen=True)
class PlainScan:
    """One scan, as far as its files tell."""

    name: str
    """E.g. "scan_12"; the sample's name in the run."""
    frames: tuple[Frames, ...]
    """In scan order: the first frame of the first is point 1."""
    shape: tuple[int, int] | None = None
    """Rows and columns of the scan, e.g. (165, 165)."""
    snaking: bool | None = None
    """Whether every second row is flown backwards; found from the positions if None."""
    motors: tuple[Motor, Motor] | None = None
    """The (slow, fast) scan motors."""
    geometry: Mapping[str, Any] = field(default_factory=dict)
    """Items of the `nanobeam` block, e.g. {"energy_keV": 11.3}; the user's own come first."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """More items of the start document, e.g. {"scan_id": 12, "time": 1.7e9}."""
    notes: tuple[str, ...] = ()
    """What the user should know, e.g. "2 images are missing: 17, 23"."""

    @property
    def count(self) -> int:
        """Number of frames."""
        return sum(frames.count for frames in self.frames)


Reader = Callable[[Path, Options], Iterable[PlainScan] | None]


def readers() -> dict[str, Callable[[], Reader]]:
    """Return what loads each reader, by its name, in the order in which they are tried."""
    found = {point.name: point.load for point in entry_points(group="nanobeam.readers")}
    last = {name: i for i, name in enumerate(BUILT_IN)}
    return {name: found[name] for name in sorted(found, key=lambda n: (last.get(n, -1), n))}


def find_scans(
    path: Path, options: Options, layout: str | None = None
) -> tuple[str, list[PlainScan]]:
    """Return the layout of a file or folder, and its scans.

    Raises
    ------
    ValueError, OSError
        If no reader knows it, or the one that does cannot read it: says why.
    """
    known = readers()
    if layout is not None and layout not in known:
        raise ValueError(f"no layout {layout!r}: known are {', '.join(known)}")
    if not path.exists():
        raise ValueError("no such file or folder")
    if not (path.is_dir() or path.is_file()):
        raise ValueError("neither a file nor a folder")
    for name in [layout] if layout else known:
        scans = known[name]()(path, options)
        if scans is not None:
            return name, list(scans)
    kind = f"of layout {layout!r}" if layout else f"of a known layout ({', '.join(known)})"
    raise ValueError(f"no {'folder' if path.is_dir() else 'file'} {kind}")
