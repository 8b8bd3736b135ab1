"""`FileWatch`: detector files of a beamline without Bluesky become runs while they grow."""

from __future__ import annotations

import glob
import logging
import os
import stat
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h5py
import numpy as np
from event_model import compose_run

from nanobeam_bluesky.documents.plain_files import (
    KEY,
    TIFF_SUFFIXES,
    frame_datasets,
    natural,
    numbered,
)
from nanobeam_bluesky.transports.receiver import Take

__all__ = ["FileWatch"]

logger = logging.getLogger("nanobeam_bluesky")

POLL_SECONDS = 0.25
CLOSED_SECONDS = 1.0
"""A file that has not grown for so long is tried for whether its writer has closed it."""
_NAMESPACE = uuid.UUID("8f7c1a52-4c5e-4a43-9a0b-2f6f3a0d9c11")


class FileWatch:
    """Turns new HDF5 and TIFF files into documents that point at them where they lie.

    An HDF5 file is a run, its frames the only dataset of three dimensions. TIFF files that
    differ by their last number alone are a run; the number gives the point. What was there
    before and does not change any more is left alone.

    Parameters
    ----------
    pattern
        Such as "/data/**/scan_*.h5", as for `glob.glob`.
    geometry
        Values of the ``nanobeam`` block, such as those of a TOML file.
    shape
        Rows and columns of the scan. Without it an HDF5 file is one row, as long as the
        dataset will be at most (its maxshape), or is when its writer has closed it.
    snake
        Whether every second row is flown backwards.
    dataset
        The frames in an HDF5 file, where there are several.
    idle
        A run is done when all points of its shape are there, or after so many seconds
        without growth; without `shape` also when the file is closed.
    """

    def __init__(
        self,
        pattern: str,
        geometry: Mapping[str, Any],
        *,
        shape: tuple[int, int] | None = None,
        snake: bool = False,
        dataset: str | None = None,
        idle: float = 30.0,
    ) -> None:
        self.pattern = pattern
        self.idle = idle
        self._geometry = dict(geometry)
        self._shape = shape
        self._snake = snake
        self._dataset = dataset
        self._seen: dict[str, os.stat_result] = {}
        self._runs: dict[str, _Run] = {}
        self._done: dict[str, tuple[int, bool]] = {}  # run → inode, whether all points came

    def run(self, take: Take, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Look for files, and hand documents to `take`, until `stop` is set.

        Runs in progress are closed then, as aborted.
        """
        self._seen = dict(self._scan())
        ready()
        while not stop.wait(POLL_SECONDS):
            self._poll(take)
        for run in self._runs.values():
            run.close("abort", "nanobeam live was ended before the files were complete")

    def _scan(self) -> list[tuple[str, os.stat_result]]:
        found = []
        for path in glob.glob(self.pattern, recursive=True):
            try:
                found_here = os.stat(path)
                if stat.S_ISREG(found_here.st_mode):
                    found.append((os.path.abspath(path), found_here))
            except OSError:  # gone meanwhile
                continue
        return sorted(found, key=lambda item: natural(item[0]))

    def _poll(self, take: Take) -> None:
        now = time.monotonic()
        for path, status in self._scan():
            before = self._seen.get(path)
            if before is not None and _state(before) == _state(status):
                continue
            self._seen[path] = status
            name, number = _run_of(path)
            if number is None and path.lower().endswith(TIFF_SUFFIXES):
                logger.warning("%s: expected a number at the end of a TIFF's name", path)
            elif status.st_size and not self._is_done(name, path, status.st_ino):
                self._run(name, path, status.st_ino, take).changed(path, number, now)
        for name, run in list(self._runs.items()):
            try:
                done = run.poll(now)
            except Exception as error:  # a file may be anything
                logger.exception("%s could not be followed", name)
                run.close("fail", f"{type(error).__name__}: {error}")
                done = True
            if done:
                del self._runs[name]
                self._done[name] = (run.inode, run.is_whole)

    def _is_done(self, name: str, path: str, now: int) -> bool:
        """Whether the run of a file was closed before; a new file of this name is a new run."""
        inode, whole = self._done.get(name, (None, True))
        if inode is None or (inode != now and not path.lower().endswith(TIFF_SUFFIXES)):
            return False
        if not whole:
            self._done[name] = (inode, True)  # said once
            logger.warning(
                "%s has changed after its run was closed, which is not mapped: give --shape, or "
                "a longer --idle than %g s",
                *(path, self.idle),
            )
        return True

    def _run(self, name: str, path: str, inode: int, take: Take) -> _Run:
        if name not in self._runs:
            kind = _TIFFRun if path.lower().endswith(TIFF_SUFFIXES) else _HDF5Run
            start = {
                "plan_name": "watch",
                "sample": Path(name).stem,
                "snaking": [False, self._snake],
                "nanobeam": {**self._geometry, "detector": KEY},
            }
            self._runs[name] = kind(
                name,
                inode,
                start,
                take,
                shape=self._shape,
                dataset=self._dataset,
                idle=self.idle,
            )
        return self._runs[name]


@dataclass
class _Run(ABC):
    """One run in the making."""

    name: str
    inode: int
    """Of its first file."""
    start: dict[str, Any]
    take: Take
    shape: tuple[int, int] | None
    dataset: str | None
    idle: float
    grown: float = 0.0
    """When it last grew."""
    announced: int = 0
    """Points that documents have told of."""
    problem: str = ""
    """Why there are no frames yet."""
    bundle: Any = None
    descriptor: Any = None
    resource: Any = None
    closed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all points have come."""
        return self.shape is not None and self.announced >= self.shape[0] * self.shape[1]

    def changed(self, path: str, number: int | None, now: float) -> None:
        """Note that a file has grown."""
        self.grown = now

    def poll(self, now: float) -> bool:
        """Announce what is new; whether the run is complete."""
        self.look(now)
        waited = now - self.grown
        if self.is_whole:
            return self.close("success")
        if waited < self.idle:
            return False
        if self.bundle is None:
            logger.warning("%s is not mapped: %s", self.name, self.problem)
            return True
        return self.close("success", f"no growth for {self.idle:g} s")

    @abstractmethod
    def look(self, now: float) -> None:
        """Read what is new, and announce it."""

    def open(self, shape: tuple[int, int], frame: Any, resource: Mapping[str, Any]) -> None:
        """Emit what the run begins with."""
        self.shape = shape
        self.start |= {"shape": list(shape), "num_points": shape[0] * shape[1]}
        # from the file, so that after a restart it is the same raw run
        uid = str(uuid.uuid5(_NAMESPACE, f"{self.name}/{self.inode}"))
        self.bundle = compose_run(uid=uid, metadata=self.start)
        key = {
            "source": self.name,
            "dtype": "array",
            "dtype_numpy": frame.dtype.str,
            "shape": [1, *frame.shape],
            "external": "STREAM:",
        }
        self.descriptor = self.bundle.compose_descriptor(
            name="primary", data_keys={KEY: key}, object_keys={KEY: [KEY]}
        )
        self.resource = self.bundle.compose_stream_resource(data_key=KEY, **resource)
        self.take("start", self.bundle.start_doc)
        self.take("descriptor", self.descriptor.descriptor_doc)
        self.take("stream_resource", self.resource.stream_resource_doc)
        logger.info("%s: run %s begins", self.name, uid[:8])

    def announce(self, first: int, stop: int, index: int) -> None:
        """Emit that the points first ≤ point < stop can be read, from this index on."""
        datum = self.resource.compose_stream_datum(
            indices={"start": index, "stop": index + stop - first},
            seq_nums={"start": first, "stop": stop},
            descriptor=self.descriptor.descriptor_doc,
        )
        self.take("stream_datum", datum)
        self.announced += stop - first

    def close(self, status: str, reason: str = "") -> bool:
        """Emit the stop, if there was a start."""
        if self.bundle is not None and not self.closed:
            stop = self.bundle.compose_stop(exit_status=status, reason=reason)
            self.take("stop", stop | {"num_events": {"primary": self.announced}})
        self.closed = True
        return True


class _HDF5Run(_Run):
    def poll(self, now: float) -> bool:
        given = self.shape
        done = super().poll(now)
        if done or given is not None or now - self.grown < CLOSED_SECONDS:
            return done
        try:
            with h5py.File(self.name, "r") as file:  # refused while a writer has it
                found = self._find(file)
                if found is None:
                    return False
                self._take_rows(found, complete=True)
        except OSError:
            return False
        return self.close("success")

    def look(self, now: float) -> None:
        try:
            # without a lock, which could keep a writer from opening the file again
            with h5py.File(self.name, "r", libver="latest", swmr=True, locking=False) as file:
                found = self._find(file)
                if found is not None:
                    self._take_rows(found)
        except OSError as error:
            self.problem = f"not readable as HDF5: {error}"

    def _find(self, file: h5py.File) -> h5py.Dataset | None:
        """Return the dataset of the frames, if it is there."""
        if self.dataset is None:
            names = frame_datasets(file)
            if len(names) > 1:
                self.problem = f"it has several datasets of frames, {names}: say which by --dataset"
                return None
            if not names:
                self.problem = "it has no dataset of frames (n, rows, columns)"
                return None
            self.dataset = names[0]
        found = file.get(self.dataset)
        if not isinstance(found, h5py.Dataset) or found.ndim != 3:
            self.problem = f"expected frames (n, rows, columns) at {self.dataset}, found {found}"
            return None
        return found

    def _take_rows(self, frames: h5py.Dataset, *, complete: bool = False) -> None:
        count = frames.shape[0] if complete else _written(frames, self.announced)
        if self.bundle is None:
            most = frames.shape[0] if complete else frames.maxshape[0]
            shape = self.shape or ((1, most) if most else None)
            if not count or shape is None:
                self.problem = "it has no frames yet, or how many there will be is not known"
                return
            self.open(
                shape,
                np.empty(frames.shape[1:], frames.dtype),
                {
                    "mimetype": "application/x-hdf5",
                    "uri": f"file://localhost{quote(self.name)}",
                    "parameters": {"dataset": self.dataset, "chunk_shape": [1, *frames.shape[1:]]},
                },
            )
        if count > self.announced:
            self.grown = time.monotonic()
            self.announce(self.announced + 1, count + 1, self.announced)


@dataclass
class _TIFFRun(_Run):
    sizes: dict[int, int] = field(default_factory=dict)
    """File number → size when last looked at."""
    paths: dict[int, str] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    """Files that may still be written."""
    first: int | None = None
    """Number of the first file: point 1."""

    def changed(self, path: str, number: int | None, now: float) -> None:
        super().changed(path, number, now)
        assert number is not None
        if number not in self.paths or number in self.waiting:
            self.paths[number] = path
            self.waiting.add(number)

    def look(self, now: float) -> None:
        ready = []
        for number in sorted(self.waiting):
            size = os.stat(self.paths[number]).st_size
            # whole if it has not grown since, or the next one has begun
            if size and (self.sizes.get(number) == size or number + 1 in self.paths):
                ready.append(number)
            self.sizes[number] = size
        if not ready:
            return
        self.waiting -= set(ready)
        if self.bundle is None:
            self._open(ready[0])
            if self.bundle is None:
                return
        assert self.first is not None
        early = [n for n in ready if n < self.first]
        if early:
            logger.warning("%s: files before number %d are left out", self.name, self.first)
        numbers = [n for n in ready if n >= self.first]
        for group in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            if len(group):
                begin, stop = int(group[0]), int(group[-1]) + 1
                self.announce(begin - self.first + 1, stop - self.first + 1, begin)

    def _open(self, number: int) -> None:
        from nanobeam_bluesky.documents.formats import read_tiff

        if self.shape is None:
            self.problem = "how many TIFF files a run has must be said by --shape"
            return
        path = self.paths[number]
        folder, name = os.path.split(path)
        parts = numbered(name)
        assert parts is not None
        head, digits, tail = (part.replace("{", "{{") for part in parts)
        self.first = number
        frame = read_tiff(path, 0)
        self.open(
            self.shape,
            frame,
            {
                "mimetype": "multipart/related;type=image/tiff",
                "uri": f"file://localhost{quote(folder)}/",
                "parameters": {
                    "template": f"{head}{{:0{len(digits)}d}}{tail}",
                    "chunk_shape": [1, *frame.shape],
                    "join_method": "stack",
                },
            },
        )


def _written(frames: h5py.Dataset, known: int) -> int:
    """Return how many frames have been written: a file may be made in its full size at first."""
    if frames.chunks is None:
        return int(frames.shape[0])
    count = known - known % frames.chunks[0]
    last = [(n - 1) // c * c for n, c in zip(frames.shape[1:], frames.chunks[1:], strict=True)]
    while count < frames.shape[0]:
        if frames.id.get_chunk_info_by_coord((count, *last)).byte_offset is None:
            break
        count += frames.chunks[0]
    return int(min(count, frames.shape[0]))


def _run_of(path: str) -> tuple[str, int | None]:
    """Return what a file's run is called, and for TIFF the file's number."""
    if not path.lower().endswith(TIFF_SUFFIXES):
        return path, None
    parts = numbered(path)
    if parts is None:
        return path, None
    head, digits, tail = parts
    return f"{head}{tail}", int(digits)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is written, or another takes its place."""
    return status.st_ino, status.st_size, status.st_mtime_ns
