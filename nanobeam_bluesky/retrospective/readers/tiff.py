"""TIFF files of one frame each, numbered; and those of APS 26-ID, beside an MDA file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanobeam_bluesky.documents.formats import NotYetError
from nanobeam_bluesky.documents.formats import read_tiff as read_page
from nanobeam_bluesky.documents.plain_files import TIFF_SUFFIXES, natural, numbered
from nanobeam_bluesky.documents.resources import NUMBERED_TIFF
from nanobeam_bluesky.retrospective.readers import Frames, Motor, Options, PlainScan
from nanobeam_bluesky.retrospective.readers.mda import MDA, read_mda

__all__ = ["read_aps26id", "read_tiff"]

TRIED = 8
"""Images that are opened for shape and type, until one can be read."""


def read_tiff(path: Path, options: Options) -> Iterable[PlainScan] | None:
    """Read a folder of TIFF files, or the series that one of them belongs to."""
    if not path.is_dir() and not path.name.lower().endswith(TIFF_SUFFIXES):
        return None
    folder = path if path.is_dir() else path.parent
    series = _series(folder)
    if not path.is_dir():
        parts = numbered(path.name)
        if parts is None:
            raise ValueError("expected a number at the end of a TIFF's name")
        series = {(parts[0], parts[2]): series[parts[0], parts[2]]}
    elif not series:
        if any(entry.name.lower().endswith(TIFF_SUFFIXES) for entry in os.scandir(folder)):
            raise ValueError("expected a number at the end of each TIFF's name")
        return None
    return [
        _scan(folder, names, options.shape)
        for _, names in sorted(series.items(), key=lambda item: natural(item[0][0]))
    ]


def read_aps26id(path: Path, options: Options) -> Iterable[PlainScan] | None:
    """Read ``NNN.mda`` with its ``images/NNN/scan_NNN_img_*.tif``."""
    if path.suffix.lower() != ".mda":
        return None
    mda = read_mda(path)
    folder = _images(path)
    series = _series(folder)
    if len(series) > 1:
        ours = {key: names for key, names in series.items() if "img" in key[0]}
        series = ours if len(ours) == 1 else series
    if len(series) != 1:
        found = ", ".join(f"{head}*{tail}" for head, tail in series) or "none"
        raise ValueError(f"expected one series of images in {folder}, found {found}")
    ((_, names),) = series.items()
    shape = (mda.shape[0], mda.shape[1])
    scan = _scan(folder, names, shape, points=mda.points)
    notes = list(scan.notes)
    if mda.points < shape[0] * shape[1]:
        notes.insert(0, f"interrupted: {mda.points} of {shape[0]} × {shape[1]} points")
    return [
        replace(
            scan,
            name=path.stem,
            shape=shape,
            motors=_motors(mda),
            metadata={"scan_id": mda.number} | ({"time": mda.time} if mda.time else {}),
            notes=tuple(notes),
        )
    ]


def _images(path: Path) -> Path:
    """Return the folder of an MDA file's images."""
    number = re.findall(r"\d+", path.stem)
    if not number:
        raise ValueError("expected the scan's number in its name, such as 0123.mda")
    names = dict.fromkeys((number[-1], str(int(number[-1]))))
    places: list[Path] = [
        parent / images / name
        for parent in (path.parent, path.parent.parent)
        for images in ("images", "Images")
        for name in names
    ]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise ValueError(f"no images: expected the folder {places[0]}")
    return folder


def _motors(mda: MDA) -> tuple[Motor, Motor] | None:
    if None in mda.positioners:
        return None
    slow, fast = (  # 26idc:m1.VAL is called m1
        Motor(re.sub(r".*:|\.(VAL|RBV)$", "", p.name), p.values.ravel()[: mda.points], p.unit)
        for p in mda.positioners
        if p
    )
    return slow, fast


Names = list[tuple[int, str, str]]
"""Number, as a number and as it is written; and name."""


def _series(folder: Path) -> dict[tuple[str, str], Names]:
    """Return the TIFF files of a folder, those together that differ by their last number alone."""
    series: dict[tuple[str, str], Names] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.lower().endswith(TIFF_SUFFIXES):
                continue
            parts = numbered(entry.name)
            if parts is not None:
                head, digits, tail = parts
                series.setdefault((head, tail), []).append((int(digits), digits, entry.name))
    return {key: sorted(names) for key, names in series.items()}


def _scan(
    folder: Path, names: Names, shape: tuple[int, int] | None, *, points: int | None = None
) -> PlainScan:
    """Describe a series of files; only one of them is opened.

    `points`: how many the scan has, where that is known.
    """
    numbers = np.array([number for number, _, _ in names])
    wanted = shape[0] * shape[1] if shape else 0
    first, last = int(numbers[0]), int(numbers[-1])
    if last - wanted in (-1, 0) and last - wanted + 1 < first:
        first = last - wanted + 1  # counted from 0 or 1: it is the first that is missing
    count = last - first + 1
    notes = []
    if points is not None:
        if count > points:
            notes.append(f"{count - points} images more than points, left out")
        count = points
    there = numbers[(numbers >= first) & (numbers < first + count)] - first + 1
    missing = np.setdiff1d(np.arange(1, count + 1), there)
    if len(missing):
        listed = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        notes.append(f"{len(missing)} images are missing, of the points {listed}")
    frame = _readable(folder, names)
    width = min(len(digits) for _, digits, _ in names)
    parts = numbered(names[0][2])
    assert parts is not None
    parameters: dict[str, Any] = {
        "template": f"{parts[0]}{{:0{width}d}}{parts[2]}",
        "first": first,
        "chunk_shape": [1, *frame.shape],
    }
    path = f"{folder}/"
    frames = Frames(path, NUMBERED_TIFF, parameters, count, frame.shape, frame.dtype)
    return PlainScan(parts[0].rstrip("_-. ") or folder.name, (frames,), notes=tuple(notes))


def _readable(folder: Path, names: Names) -> Any:
    """Return the first image that can be read."""
    problem = ""
    for _, _, name in names[:TRIED]:
        try:
            frame = read_page(os.path.realpath(folder / name), 0)
        except NotYetError as error:
            problem = problem or str(error)
            continue
        if frame.ndim != 2 or frame.dtype.kind not in "uif":
            raise ValueError(f"{name}: expected a grey image, found {frame.shape} {frame.dtype}")
        return frame
    raise ValueError(problem)
