"""Reading frames and positions from files that may still be written, and binning them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import hdf5plugin  # noqa: F401  registers the compression filters of detectors
import numpy as np
from numpy.typing import NDArray

from nanobeam_bluesky.documents.formats import (
    HandlerReader,
    NeverError,
    NotYetError,
    check_regular,
    read_tiff,
)
from nanobeam_bluesky.documents.references import PointBlock, StoredRows
from nanobeam_bluesky.documents.roots import Roots
from nanobeam_bluesky.geometry import ROI, Geometry, GeometryError

if TYPE_CHECKING:
    from nanobeam_bluesky.documents.chunks import ChunkLayout

__all__ = ["FrameReader", "ReadStatus"]

MAX_OPEN_FILES = 16
MAX_FRAMES = 4096
"""Frames that are read at once, where a point has several."""


class ReadStatus(IntEnum):
    """What became of one point."""

    OK = 0
    RETRY = 1
    """Not readable yet: the file is not there, or not that far."""
    NEVER = 2
    """Cannot be read, however long one waits."""


@dataclass
class _File:
    hdf5: h5py.File
    growing: bool
    """Whether a writer in SWMR mode had it when it was opened."""
    state: tuple[int, int, int]
    """Inode, size and time of the last change when it was opened."""
    datasets: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, ChunkLayout | None] = field(default_factory=dict)

    def is_current(self, path: str) -> bool:
        """Whether the file is what it was when it was opened, or has grown by SWMR."""
        try:
            inode, size, changed = _state(path)
        except FileNotFoundError:  # moved away: what was announced is the one in hand
            return True
        if not self.growing:
            return (inode, size, changed) == self.state
        same = inode == self.state[0] and size >= self.state[1]
        self.state = (inode, size, changed)
        return same


class FrameReader:
    """Reads ROIs of stored frames, and stored scalars.

    Files stay open (the last `MAX_OPEN_FILES`); one that was written meanwhile, other than in
    SWMR mode, is opened anew. Several threads may read at once: while one waits for the disk,
    others bin.

    Parameters
    ----------
    geometry
        For patterns: its ROI, binning, orientation, mask and saturation value apply.
    roots
        Files elsewhere are refused, by whatever link they are named, as are handlers.
    refresh
        Whether growing files are refreshed with every read. Not where others of this process
        read the same files: to refresh one of two handles of a dataset makes HDF5 2.0 lose
        chunks, or the process.
    """

    def __init__(
        self,
        geometry: Geometry | None = None,
        roots: Roots | None = None,
        *,
        refresh: bool = True,
    ) -> None:
        self._geometry = geometry
        self._roots = roots
        self._refresh = refresh
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._handlers = HandlerReader()
        self._lock = threading.Lock()
        # to leave it to the garbage collector fails: a file may go before its datasets
        weakref.finalize(self, _close, self._files)

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            self._forget_all()

    def reopen(self, paths: Iterable[str]) -> None:
        """Close files, so that what was added to them is seen without a refresh."""
        with self._lock:
            for path in paths:
                self._forget(path)

    def patterns(
        self, block: PointBlock, geometry: Geometry | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int8], str]:
        """Read the patterns of a block, with the reader's geometry or another.

        Returns
        -------
        patterns
            (n, ny, nx), counts; 0 where not read.
        saturated
            (n,), whether a pixel of the ROI reached the saturation value.
        status
            (n,), `ReadStatus`.
        reason
            Why a point could not be read; "" if all were.
        """
        geometry = geometry or self._geometry
        if geometry is None:
            raise ValueError("patterns need a geometry")
        k = block.stored.rows_per_point if block.stored else 1
        if k > 1 and block.count * k > MAX_FRAMES:
            return self._in_parts(block, k, geometry)
        n = block.count
        with self._lock:
            frames, status, reason = self._rows(block, geometry.roi)
        patterns = np.zeros((n, *geometry.pattern_shape), dtype=np.float32)
        saturated = np.zeros(n, dtype=bool)
        ok = status == ReadStatus.OK
        if frames is not None and ok.any():
            from nanobeam_bluesky.documents.binning import bin_frames

            frames = frames[ok]
            binned, hot = bin_frames(frames.reshape(-1, *frames.shape[-2:]), geometry)
            if frames.ndim == 4:  # a point is the sum of its frames, saturated where one is
                binned = binned.reshape(*frames.shape[:2], *binned.shape[1:]).sum(axis=1)
                hot = np.asarray(hot.reshape(frames.shape[:2]).any(axis=1))
            patterns[ok], saturated[ok] = binned, hot
        return patterns, saturated, status, reason

    def scalars(self, block: PointBlock) -> tuple[NDArray[np.float64], NDArray[np.int8], str]:
        """Read one number a point: values (n,), NaN where not read, status (n,), reason."""
        with self._lock:
            values, status, reason = self._rows(block, None)
        numbers = np.full(block.count, np.nan)
        ok = status == ReadStatus.OK
        if values is not None and ok.any():
            numbers[ok] = values[ok]
        if block.stored is not None:
            numbers *= block.stored.scale
        return numbers, status, reason

    def frames(
        self, block: PointBlock, roi: ROI
    ) -> tuple[NDArray[Any] | None, NDArray[np.int8], str]:
        """Read a region of frames as they are, (n, rows, columns); the sum of a point's several.

        None where no point could be read; status (n,) and reason as of `patterns`.
        """
        with self._lock:
            frames, status, reason = self._rows(block, roi)
        if frames is not None and frames.ndim == 4:
            frames = frames[:, 0] if frames.shape[1] == 1 else frames.sum(axis=1)
        return frames, status, reason

    def shape(self, path: str, dataset: str) -> tuple[int, ...]:
        """Return the shape of a dataset.

        Raises
        ------
        NeverError, NotYetError
            If it cannot be read, now or at all.
        """
        with self._lock:
            shape: tuple[int, ...] = self._dataset(StoredRows(path, dataset, 0)).shape
            return shape

    # ------------------------------------------------------------------ internals

    def _in_parts(
        self, block: PointBlock, k: int, geometry: Geometry
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int8], str]:
        """Read patterns whose frames are too many to be held at once."""
        assert block.stored is not None
        if block.count > 1:
            step = max(1, MAX_FRAMES // k)
            edges = range(block.first, block.stop, step)
            parts = [
                self.patterns(block.part(a, min(a + step, block.stop)), geometry) for a in edges
            ]
            patterns, saturated, status = (
                np.concatenate([part[i] for part in parts]) for i in range(3)
            )
            return patterns, saturated, status, next((part[3] for part in parts if part[3]), "")
        pattern, hot = np.zeros((1, *geometry.pattern_shape), np.float32), np.zeros(1, bool)
        stop = block.stored.row + k
        for row in range(block.stored.row, stop, MAX_FRAMES):
            rows = replace(block.stored, row=row, rows_per_point=min(stop - row, MAX_FRAMES))
            more, also, status, reason = self.patterns(replace(block, stored=rows), geometry)
            if status[0] != ReadStatus.OK:
                return np.zeros_like(pattern), np.zeros_like(hot), status, reason
            pattern, hot = pattern + more, hot | also
        return pattern, hot, status, ""

    def _rows(
        self, block: PointBlock, roi: ROI | None
    ) -> tuple[NDArray[Any] | None, NDArray[np.int8], str]:
        """Read what can be read of a block: frames cut to the ROI, or numbers without one.

        A bad row costs its own point only.
        """
        status = np.zeros(block.count, dtype=np.int8)
        if block.values is not None:
            return block.values, status, ""
        if block.stored is None:
            status[:] = ReadStatus.NEVER
            return None, status, block.problem
        stored = block.stored
        reason = ""
        if stored.rows_per_file or stored.handler:
            return self._elsewhere(block, status, roi)
        read = self._read_of(roi)
        try:
            dataset = self._dataset(stored)
            opened = self._files[stored.path]
            length = dataset.shape[0] if dataset.ndim < 4 else dataset.shape[0] * dataset.shape[1]
            stored = _shared(stored, length)
            if roi and stored.rows_per_point * block.count > MAX_FRAMES:
                raise NeverError(f"{stored.rows_per_point} frames for each point are too many")
            block = replace(block, stored=stored)
            available = max(0, length - stored.row) // stored.rows_per_point
            if available < block.count:
                status[available:] = ReadStatus.RETRY
                reason = (
                    f"{stored.path}:{stored.dataset} has {length} rows, row "
                    f"{stored.row + block.count * stored.rows_per_point - 1} was announced"
                )
            n = min(available, block.count)
            try:
                if not n:
                    return None, status, reason
                if self._is_short(stored.path):
                    raise OSError("the file is shorter than it says")
                values = read(dataset, stored, n)
                self._check_unchanged(stored.path, opened)
            except OSError:
                return self._one_by_one(block, n, read, status)
            finally:
                if n < block.count and not opened.growing:
                    self._forget(stored.path)  # not told apart by time if written just now
        except NotYetError as error:
            status[:] = ReadStatus.RETRY
            return None, status, str(error)
        except (NeverError, GeometryError) as error:
            status[:] = ReadStatus.NEVER
            return None, status, f"{stored.path}:{stored.dataset}: {error}"
        except Exception as error:  # h5py raises many kinds on damaged files
            self._forget(stored.path)
            status[:] = ReadStatus.RETRY
            return None, status, f"{stored.path}:{stored.dataset}: {error}"
        return _padded(values, block.count), status, reason

    def _one_by_one(
        self, block: PointBlock, n: int, read: Callable[..., NDArray[Any]], status: NDArray[np.int8]
    ) -> tuple[NDArray[Any] | None, NDArray[np.int8], str]:
        assert block.stored is not None
        values: list[Any] = [None] * n
        reason = ""
        for i in range(n):
            stored = block.part(block.first + i, block.first + i + 1).stored
            assert stored is not None
            try:
                dataset = self._dataset(stored)
                if self._is_short(stored.path):
                    self._check_within(dataset, stored)
                opened = self._files[stored.path]
                row = read(dataset, stored, 1)[0]
                self._check_unchanged(stored.path, opened)
                values[i] = row
            except OSError as error:
                status[i] = ReadStatus.RETRY
                reason = f"{stored.path}:{stored.dataset} row {stored.row}: {error}"
        good = [v for v in values if v is not None]
        if not good:
            return None, status, reason
        blank = np.zeros_like(good[0])
        rows = np.stack([blank if v is None else v for v in values])
        return _padded(rows, block.count), status, reason

    def _elsewhere(
        self, block: PointBlock, status: NDArray[np.int8], roi: ROI | None
    ) -> tuple[NDArray[Any] | None, NDArray[np.int8], str]:
        """Read from a sequence of files, or by a handler: point by point."""
        assert block.stored is not None
        values: list[Any] = [None] * block.count
        reason = ""
        for i in range(block.count):
            stored = block.part(block.first + i, block.first + i + 1).stored
            assert stored is not None
            try:
                rows = (self._handled if stored.handler else self._numbered)(stored, roi)
                values[i] = rows if roi else rows.mean()
            except NotYetError as error:
                status[i], reason = ReadStatus.RETRY, str(error)
            except (NeverError, GeometryError) as error:
                status[i], reason = ReadStatus.NEVER, f"{stored.path}: {error}"
            except Exception as error:  # of a damaged file
                self._forget_all()
                status[i], reason = ReadStatus.RETRY, f"{stored.path}: {error}"
        good = [v for v in values if v is not None]
        if not good:
            return None, status, reason
        blank = np.zeros_like(good[0])
        return np.stack([blank if v is None else v for v in values]), status, reason

    def _numbered(self, stored: StoredRows, roi: ROI | None) -> NDArray[Any]:
        """Read the rows of one point from the files of a sequence."""
        rows = []
        for row in range(stored.row, stored.row + stored.rows_per_point):
            number, page = divmod(row, stored.rows_per_file)
            path = stored.path.format(number)
            if stored.dataset:
                one = StoredRows(path, stored.dataset, page)
                dataset = self._dataset(one)
                if page >= dataset.shape[0]:
                    raise NotYetError(f"{path}:{stored.dataset} has no row {page}")
                opened = self._files[path]
                rows.append(self._read_of(roi)(dataset, one, 1)[0])
                self._check_unchanged(path, opened)
            else:
                image = read_tiff(self._roots.resolve(path) if self._roots else path, page)
                if image.ndim != 2 or image.dtype.kind not in "uifb":
                    raise NeverError(f"expected a grey image, found {image.shape} {image.dtype}")
                assert roi is not None
                roi.check_inside(image.shape)
                rows.append(image[roi.slices])
        return np.stack(rows)

    def _handled(self, stored: StoredRows, roi: ROI | None) -> NDArray[Any]:
        """Return the rows of one point of what a handler reads."""
        if self._roots:
            raise NeverError("only a handler can read it, which may read any file")
        values = self._handlers.read(stored, roi)
        stored = _shared(stored, len(values))
        rows = values[stored.row : stored.row + stored.rows_per_point]
        if len(rows) < stored.rows_per_point:
            raise NotYetError(f"{stored.path} has {len(values)} rows, none for row {stored.row}")
        return rows

    def _is_short(self, path: str) -> bool:
        """Whether the file is truncated: in SWMR mode HDF5 gives zeros for what is cut off."""
        file = self._files[path].hdf5.id
        return bool(os.fstat(file.get_vfd_handle()).st_size < file.get_filesize())

    def _check_unchanged(self, path: str, opened: _File) -> None:
        """Raise `NotYetError` if a file was written while it was read, other than by SWMR."""
        if not opened.growing and not opened.is_current(path):
            self._forget(path)
            raise NotYetError(f"{path}: written while it was read")

    @staticmethod
    def _check_within(dataset: Any, stored: StoredRows) -> None:
        """Raise OSError if the chunks of one point lie beyond the end of a truncated file."""
        size = os.stat(stored.path).st_size
        for row in range(stored.row, stored.row + stored.rows_per_point):
            whole = (slice(row, row + 1), *(slice(0, n) for n in dataset.shape[1:]))
            for chunk in dataset.iter_chunks(whole):
                start = tuple(s.start // c * c for s, c in zip(chunk, dataset.chunks, strict=True))
                info = dataset.id.get_chunk_info_by_coord(start)
                if info.byte_offset is None or info.byte_offset + info.size > size:
                    raise OSError("cut off: the file is truncated")

    def _dataset(self, stored: StoredRows) -> Any:
        opened = self._open(stored.path)
        file, datasets = opened.hdf5, opened.datasets
        # one handle each: to refresh one of two makes HDF5 2.0 lose chunks, silently
        dataset = datasets.get(stored.dataset)
        if dataset is None:
            if self._roots:
                self._roots.check(file, stored.dataset)
            dataset = file.get(stored.dataset)
            # it may have another name, such as one without the leading slash
            dataset = next((known for known in datasets.values() if known == dataset), dataset)
            datasets[stored.dataset] = dataset
        if dataset is None:
            self._forget(stored.path)
            raise NotYetError(f"{stored.path} has no dataset {stored.dataset}")
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "uifb":
            what = dataset.dtype if isinstance(dataset, h5py.Dataset) else "a group"
            raise NeverError(f"expected a dataset of numbers, found {what}")
        if self._refresh and opened.growing:  # any other one is opened anew when it has changed
            dataset.refresh()
        return dataset

    def _open(self, path: str) -> _File:
        opened = self._files.get(path)
        if opened is not None and opened.is_current(path):
            self._files.move_to_end(path)
            return opened
        self._forget(path)
        check_regular(path)
        real = self._roots.resolve(path) if self._roots else path
        try:
            state = _state(real)
            # in SWMR mode one that was closed, or is truncated, can be opened as well
            file = h5py.File(real, "r", libver="latest", swmr=True)
        except (OSError, ValueError) as error:
            raise NotYetError(f"{path}: {error}") from error
        growing = _has_swmr_writer(file)
        if not growing and _is_locked(real):
            file.close()
            raise NotYetError(f"{path}: its writer has it open, and not in SWMR mode")
        self._files[path] = _File(file, growing, state)
        while len(self._files) > MAX_OPEN_FILES:
            self._forget(next(iter(self._files)))
        return self._files[path]

    def _forget(self, path: str) -> None:
        if path in self._files:
            self._files.pop(path).hdf5.close()

    def _forget_all(self) -> None:
        self._handlers.close()
        for path in list(self._files):
            self._forget(path)

    def _read_of(self, roi: ROI | None) -> Callable[..., NDArray[Any]]:
        return self._scalar_rows if roi is None else partial(self._frame_rows, roi=roi)

    def _frame_rows(self, dataset: Any, stored: StoredRows, n: int, roi: ROI) -> NDArray[Any]:
        if dataset.ndim not in (3, 4):
            raise NeverError(f"expected frames (n, rows, columns), found shape {dataset.shape}")
        rows, cols = (slice(None), slice(None)) if stored.cut else roi.slices
        if not stored.cut:
            roi.check_inside(dataset.shape[-2:])
        k = stored.rows_per_point
        frames = None if stored.cut else self._direct(dataset, stored, n * k, roi)
        if frames is None:
            frames = _consecutive(dataset, stored.row, n * k, rows, cols)
            if not stored.cut:
                _check_chunks(dataset, stored.row, frames, roi)
        return frames if k == 1 else frames.reshape(n, k, *frames.shape[1:])

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Let other threads read meanwhile."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def _direct(self, dataset: Any, stored: StoredRows, n: int, roi: ROI) -> NDArray[Any] | None:
        """Read frames from their chunks; None where the library must, or must say what is wrong."""
        from nanobeam_bluesky.documents.chunks import chunk_layout, read_region

        opened = self._files[stored.path]
        if stored.dataset not in opened.layouts:
            here = dataset.file.filename == opened.hdf5.filename  # no external link
            layout = chunk_layout(dataset) if here and not opened.hdf5.userblock_size else None
            opened.layouts[stored.dataset] = layout
        layout = opened.layouts[stored.dataset]
        if layout is None:
            return None
        try:
            descriptor = opened.hdf5.id.get_vfd_handle()
            return read_region(dataset, layout, descriptor, stored.row, n, roi, self._unlocked())
        except OSError:
            return None

    @staticmethod
    def _scalar_rows(dataset: Any, stored: StoredRows, n: int) -> NDArray[Any]:
        values = dataset[stored.row : stored.row + n * stored.rows_per_point]
        mean: NDArray[Any] = np.asarray(values, dtype=float).reshape(n, -1).mean(axis=1)
        return mean


def _close(files: OrderedDict[str, _File]) -> None:
    while files:
        files.popitem()[1].hdf5.close()


def _shared(stored: StoredRows, length: int) -> StoredRows:
    """Return the rows of a dataset that points share, now that its length is known."""
    if not stored.shared_by:
        return stored
    if length < stored.shared_by or length % stored.shared_by:
        raise NotYetError(
            f"{stored.path}:{stored.dataset} has {length} rows, which {stored.shared_by} points "
            "do not share equally"
        )
    k = length // stored.shared_by
    return replace(stored, row=stored.row * k, rows_per_point=k, shared_by=0)


def _consecutive(dataset: Any, row: int, count: int, rows: slice, cols: slice) -> NDArray[Any]:
    """Read frames (n, rows, columns); those of a dataset (m, k, …) follow each other."""
    frames: NDArray[Any]
    if dataset.ndim == 3:
        frames = dataset[row : row + count, rows, cols]
        return frames
    k = dataset.shape[1]
    first = row // k
    frames = dataset[first : -(-(row + count) // k), :, rows, cols]
    frames = frames.reshape(-1, *frames.shape[2:])
    return frames[row - first * k :][:count]


def _check_chunks(dataset: Any, row: int, frames: NDArray[Any], roi: ROI) -> None:
    """Raise OSError where a frame (of n, rows, columns) is not written yet: HDF5 gives zeros."""
    if dataset.ndim != 3 or not (dataset.chunks or dataset.is_virtual):
        return
    blank = np.flatnonzero(~frames.any(axis=(1, 2)))
    if dataset.is_virtual and len(blank):
        folder = Path(dataset.file.filename).parent
        for name in {source.file_name for source in dataset.virtual_sources()} - {"."}:
            if "%" not in name and not (folder / name).exists():
                raise OSError(f"its source {name} is not there")
    if dataset.chunks is None:
        return
    for i in blank:
        place = (row + int(i), roi.row, roi.col)
        chunk = tuple(at // size * size for at, size in zip(place, dataset.chunks, strict=True))
        try:
            dataset.id.read_direct_chunk(chunk)
        except (OSError, RuntimeError, MemoryError) as error:  # of h5py, where there is none
            raise OSError(f"row {place[0]} is not written yet") from error


def _state(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _has_swmr_writer(file: h5py.File) -> bool:
    """Whether the superblock, of version 3, says that a writer has the file in SWMR mode."""
    header = os.pread(file.id.get_vfd_handle(), 12, file.userblock_size)
    return header[8] >= 3 and bool(header[11] & 4)


def _is_locked(path: str) -> bool:
    """Whether a process of this machine has the file locked for writing, as HDF5 does.

    The worker reads without locks, and to try one could keep a writer out.
    """
    status = os.stat(path)
    place = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:  # not Linux
        return False
    return any(place in line and " WRITE " in line for line in locks.splitlines())


def _padded(values: NDArray[Any], count: int) -> NDArray[Any]:
    """Append zeros to rows (n, …) up to (count, …)."""
    if len(values) == count:
        return values
    blank = np.zeros((count - len(values), *values.shape[1:]), values.dtype)
    return np.concatenate([values, blank])
