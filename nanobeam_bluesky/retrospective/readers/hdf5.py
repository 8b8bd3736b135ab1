"""Frames in HDF5 files: any dataset, and the layouts of BLISS (ESRF ID01) and of NanoMAX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers the compression filters of detectors
import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.documents.plain_files import frame_datasets, is_frames
from nanobeam_bluesky.retrospective.readers import Frames, Motor, Options, PlainScan

__all__ = [
    "frames_at",
    "numbers_of",
    "opened",
    "read_bliss",
    "read_hdf5",
    "read_nanomax",
    "stored_frames",
    "text",
    "times",
    "titles",
]

SUFFIXES = (".h5", ".hdf5", ".hdf", ".nxs", ".nx", ".cxi")
_PARTS = re.compile(r"(.*/)?data_\d{6}")
_SCAN = re.compile(r"\d+\.1")


def read_hdf5(path: Path, options: Options) -> Iterable[PlainScan] | None:
    """Read the only dataset of frames, or the one that `options` names."""
    with opened(path) as file:
        if file is None:
            return None
        names = [options.dataset] if options.dataset else frame_datasets(file, (3, 4), links=True)
        if not names:
            raise ValueError("no frames in it: no dataset (n, rows, columns) of numbers")
        frames, shape = stored_frames(file, names)
    return [PlainScan(path.stem, frames, shape)]


def read_bliss(path: Path, options: Options) -> Iterable[PlainScan] | None:
    """Read every two-dimensional scan ``/{n}.1`` that has frames.

    Layout: ezatterin/id01-sxdm-utils ``sxdm/io/bliss.py`` (``technique/dim0``, the fast axis,
    and ``dim1``; a file that was interrupted has fewer points than their product).
    """
    with opened(path) as file:
        if file is None:
            return None
        names = sorted((name for name in file if _SCAN.fullmatch(name)), key=float)
        named = (options.dataset or "").strip("/").partition("/")[0]
        scans = [
            file[name]
            for name in names
            if name == named or not named
            if isinstance(file.get(f"{name}/technique/dim0"), h5py.Dataset)
        ]
        if not scans:
            return None
        found = [_bliss(scan, path, options) for scan in scans]
    there = [scan for scan in found if scan is not None]
    if not there:
        raise ValueError(f"no frames in its scans {', '.join(names)}")
    return there


def _bliss(scan: h5py.Group, path: Path, options: Options) -> PlainScan | None:
    measurement = scan.get("measurement")
    if measurement is None:
        return None
    names = [f"{measurement.name}/{key}" for key in measurement if frames_at(measurement, key)]
    if not (names or options.dataset):
        return None
    fast, slow = (int(scan[f"technique/dim{i}"][()]) for i in (0, 1))
    frames, _ = stored_frames(scan.file, [options.dataset] if options.dataset else names)
    numbers = {k: v for k, v in measurement.items() if isinstance(v, h5py.Dataset) and v.ndim == 1}
    done = _recorded(scan.file, frames, numbers, slow * fast)
    title = text(scan.get("title"))
    words = re.findall(r"[A-Za-z_]\w*", title)
    known = [n for w in words for n in (f"{w}_position", w) if n in numbers]
    motors = None
    if len(known) >= 2:  # the command names the fast one first
        motors = (
            stored_motor(numbers[known[1]], path, done),
            stored_motor(numbers[known[0]], path, done),
        )
    number = scan.name.strip("/")
    return PlainScan(
        f"{path.stem} {number}",
        cut(frames, done),
        (slow, fast),
        motors=motors,
        metadata={"scan_id": int(number.partition(".")[0])} | times(scan) | titles(title),
        notes=(f"{number}: {slow * fast - done} of {slow * fast} points were not measured",)
        if done < slow * fast
        else (),
    )


def _recorded(
    file: h5py.File, frames: Sequence[Frames], numbers: Mapping[str, h5py.Dataset], points: int
) -> int:
    """How many points a scan has: what comes after an interruption is padded with zeros."""
    done = min(points, sum(f.count for f in frames))
    clocks = [v for k, v in numbers.items() if k in ("epoch", "elapsed_time", "epoch_trig")]
    if clocks:
        done = min(done, len(clocks[0]))
        ticks = np.flatnonzero(clocks[0][:done])
        return int(ticks[-1]) + 1 if len(ticks) else 0
    if len(frames) > 1:
        return done
    dataset = file[frames[0].parameters["dataset"]]
    step = 64
    while done > 0 and dataset.ndim == 3:  # from the end: whole frames of zeros
        first = max(0, done - step)
        lit = np.flatnonzero(dataset[first:done].any(axis=(1, 2)))
        if len(lit):
            return first + int(lit[-1]) + 1
        done = first
    return done


def read_nanomax(path: Path, options: Options) -> Iterable[PlainScan] | None:
    """Read ``entry/measurement/<detector>/frames``, with positions and shape where they are said.

    Layout: ezatterin/id01-sxdm-utils ``sxdm/utils/nanomax.py`` (`description` is the command;
    its numbers of steps are one less than those of points; ``measurement/pseudo`` has positions).
    """
    with opened(path) as file:
        measurement = None if file is None else file.get("entry/measurement")
        if file is None or not isinstance(measurement, h5py.Group):
            return None
        names = [
            f"{measurement.name}/{key}/frames"
            for key in measurement
            if frames_at(measurement, f"{key}/frames")
        ]
        if not names:
            return None
        frames, _ = stored_frames(file, [options.dataset] if options.dataset else names)
        count = sum(f.count for f in frames)
        command = text(file.get("entry/description"))
        shape, motors = None, None
        words = command.split()  # command, fast motor, first, last, steps, slow motor, …
        if len(words) > 8 and words[4].isdecimal() and words[8].isdecimal():
            fast, slow = words[1], words[5]
            shape = (int(words[8]) + 1, int(words[4]) + 1)
            motors = _nanomax_motors(measurement, (slow, fast), path, count)
    return [PlainScan(path.stem, frames, shape, motors=motors, metadata=titles(command))]


def _nanomax_motors(
    measurement: h5py.Group, names: tuple[str, str], path: Path, count: int
) -> tuple[Motor, Motor] | None:
    found = []
    for name in names:
        places = (name, f"pseudo/{name}", f"pseudo/{name.removeprefix('s')}")
        items = [measurement.get(place) for place in places]
        item = next((i for i in items if isinstance(i, h5py.Dataset) and i.size >= count), None)
        if item is None:
            return None
        found.append(stored_motor(item, path, count, name))
    return found[0], found[1]


# ------------------------------------------------------------------- for all of them


@contextmanager
def opened(path: Path) -> Iterator[h5py.File | None]:
    """Open an HDF5 file; None if it is none."""
    if path.is_dir() or not (path.suffix.lower() in SUFFIXES or h5py.is_hdf5(path)):
        yield None
        return
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise ValueError(f"not readable as HDF5: {error}") from None
    with file:
        yield file


def stored_frames(
    file: h5py.File, names: Sequence[str]
) -> tuple[tuple[Frames, ...], tuple[int, int] | None]:
    """Describe a dataset of frames, or a series data_000001 …; and the scan's shape, of one (…, 4).

    Raises
    ------
    ValueError
        If there are several, or what is named has no frames.
    """
    if len(names) > 1 and not all(_PARTS.fullmatch(name) for name in names):
        raise ValueError(f"several datasets of frames, {', '.join(names)}: say which by --dataset")
    parts = []
    for name in sorted(names):
        item = file.get(name)
        if not is_frames(item, (3, 4)):
            found = f"shape {item.shape}" if isinstance(item, h5py.Dataset) else item
            raise ValueError(f"expected frames (n, rows, columns) at {name}, found {found}")
        path, inside = file.filename, name
        if len(names) > 1:  # of several files Tiled wants the same name in each
            path, inside = item.file.filename, item.name
        rows, columns = item.shape[-2:]
        parameters = {"dataset": inside, "chunk_shape": [_chunk(item), rows, columns]}
        count = math.prod(item.shape[:-2])
        parts.append(
            Frames(path, "application/x-hdf5", parameters, count, (rows, columns), item.dtype)
        )
    shape = (item.shape[0], item.shape[1]) if item.ndim == 4 else None
    return tuple(parts), shape


def _chunk(dataset: h5py.Dataset) -> int:
    """How many frames Tiled's clients shall ask for at once: some 4 MB, and whole chunks."""
    least = int(dataset.chunks[0]) if dataset.chunks and dataset.ndim == 3 else 1
    frame: int = dataset.dtype.itemsize * math.prod(dataset.shape[-2:])
    return least * max(1, 4_000_000 // (frame * least))


def cut(frames: Sequence[Frames], count: int) -> tuple[Frames, ...]:
    """Return the first frames only."""
    kept = []
    for part in frames:
        number = min(part.count, count)
        count -= number
        if number:
            values = {n: getattr(part, n) for n in ("path", "mimetype", "parameters")}
            kept.append(Frames(**values, count=number, shape=part.shape, dtype=part.dtype))
    return tuple(kept)


def stored_motor(dataset: h5py.Dataset, path: Path, count: int, name: str = "") -> Motor:
    """Return the positions of a motor, with where they are if that is a dataset (n,)."""
    values = np.asarray(dataset[()], float).ravel()[:count]
    own = Path(dataset.file.filename) == path and dataset.ndim == 1
    return Motor(
        name or dataset.name.rpartition("/")[2].removesuffix("_position"),
        values,
        text(dataset.attrs.get("units")),
        (str(path), dataset.name) if own and len(values) == count else None,
    )


def frames_at(group: h5py.Group, key: str) -> bool:
    """Whether a group has frames under some name."""
    try:
        return is_frames(group.get(key), (3, 4))
    except (KeyError, OSError):  # a link to nowhere
        return False


def text(item: Any) -> str:
    """Return the text of a dataset or an attribute; "" where there is none."""
    value = item[()] if isinstance(item, h5py.Dataset) else item
    if isinstance(value, np.ndarray):
        value = value.ravel()[0] if value.size else ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) else ""


def titles(title: str) -> dict[str, Any]:
    """Return the command of a scan as an item of the start document."""
    return {"title": title} if title else {}


def times(entry: h5py.Group) -> dict[str, Any]:
    """Return when a scan began, as an item of the start document."""
    try:
        return {"time": datetime.fromisoformat(text(entry.get("start_time"))).timestamp()}
    except ValueError:
        return {}


def numbers_of(item: Any) -> NDArray[np.float64]:
    """Return the numbers of a dataset, flat; empty where there are none."""
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "uif":
        return np.zeros(0)
    return np.asarray(item[()], float).ravel()
